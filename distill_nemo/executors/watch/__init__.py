"""Jobs watched until their end: what their ranks say, and why they ended."""

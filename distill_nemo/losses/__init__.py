"""Divergences and hidden-state losses; they take process groups and floats."""

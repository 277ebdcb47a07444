"""The lean loop and what it steps."""

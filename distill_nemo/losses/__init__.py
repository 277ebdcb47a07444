"""Divergences and hidden-state losses. Their arguments are process groups and numbers, not configs."""

"""Device, process groups, seeds, signals."""

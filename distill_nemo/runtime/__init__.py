"""Devices, process groups, files, seeds, signals and faults."""

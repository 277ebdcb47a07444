"""Modules of a transformer layer, and sizes of layers that differ."""

"""Quantizers of a student's layers: their conversion, ranges and state."""

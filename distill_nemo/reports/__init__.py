"""Metrics to plots, tables and pages; no torch."""

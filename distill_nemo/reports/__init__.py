"""Plots, tables and pages of metrics. No torch."""

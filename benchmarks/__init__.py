"""Benchmarks of losses and steps against alternatives, with interleaved repeats in one process: `make bench`."""

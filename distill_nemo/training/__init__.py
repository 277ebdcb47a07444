"""Entry, setup, training loop, forward step and metrics of a run."""

"""A rank's own part of a loss: in plain torch, in C for CPU and in Triton for GPU."""

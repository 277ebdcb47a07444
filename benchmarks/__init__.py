"""What the losses cost beside others, measured in one process with interleaved repeats; `make bench`."""

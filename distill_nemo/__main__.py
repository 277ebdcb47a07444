"""`torchrun --rdzv-backend loopback --nproc-per-node N -m distill_nemo CONFIG.yaml`."""

from distill_nemo.training.entry import main

if __name__ == "__main__":  # checkpoint writers spawn processes that import this file
    main()

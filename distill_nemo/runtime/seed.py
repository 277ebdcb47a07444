"""Seeds of Python, NumPy, torch and Megatron's tensor-parallel generators."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed all generators. Model-parallel ranks get their own streams where they must differ.

    Data-parallel ranks share a seed, which is enough with equal weights and no dropout.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def seed_apart(offset: int) -> Iterator[None]:
    """Draw on the CPU from the run's seed plus `offset`, then restore the generator's state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed() + offset)
        yield

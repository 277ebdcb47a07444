"""One seed for Python, NumPy, torch and Megatron's tensor-parallel generators."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed all generators; model-parallel ranks get their own streams where they must differ.

    Data-parallel ranks share a seed: with equal weights and no dropout they need nothing else.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)

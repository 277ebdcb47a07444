"""Reduce per-token losses over unmasked tokens."""

import torch
from torch import Tensor


def masked_sum(values_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Return the sum over valid tokens in fp32. A masked token adds exactly 0, even if its loss is NaN."""
    return torch.where(loss_mask_BS > 0, values_BS.float() * loss_mask_BS, 0.0).sum()

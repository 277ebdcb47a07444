"""Attention whose output is multiplied by the sigmoid of a gate, without compiling that."""

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedAttention(SelfAttention):
    """Megatron's attention. It would compile the product, which takes seconds and a compiler on a CPU."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * torch.sigmoid(gate.reshape(x.shape).float())).to(x.dtype)

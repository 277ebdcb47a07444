"""Multiply embeddings and logits by a model's constants, and cap its logits.

These are our own hooks, because Megatron's `use_mup` has no residual multiplier and multiplies logits only after the
output layer, where neither the logits loss of a teacher nor the fused loss would see it.
"""

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from torch import Tensor

from distill_nemo.models.architecture import Multipliers


class ScaleEmbeddings:
    """Forward hook of the embedding."""

    def __init__(self, multipliers: Multipliers, dtype: torch.dtype) -> None:
        factor = multipliers.embedding
        self.factor = float(torch.tensor(factor, dtype=dtype)) if multipliers.rounds_embedding else factor

    def __call__(self, layer: Any, args: Any, output: Tensor) -> Tensor:
        """Multiply `[s, B, H]`."""
        return output * self.factor


class FinishLogits:
    """Forward hook of the output layer: `cap(factor * logits)`, and -inf in columns of the padded vocabulary.

    Megatron leaves those in the softmax of its cross entropy, where each untrained column counts as one more token:
    log(512 / 507) = 0.01 nats for 5 columns over a small vocabulary.
    """

    def __init__(self, multipliers: Multipliers, vocab_size: int) -> None:
        self.factor, self.softcap, self.vocab_size = multipliers.logits, multipliers.softcap, vocab_size

    def __call__(self, layer: Any, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Finish logits `[S, B, v]`, in place as far as backward allows."""
        logits_SBv, bias = output
        if self.factor != 1:
            logits_SBv = logits_SBv.mul_(self.factor)
        if self.softcap is not None:  # backward needs the tanh
            logits_SBv = logits_SBv.div_(self.softcap).tanh_() * self.softcap
        width = logits_SBv.size(-1)
        start = 0 if layer.gather_output else get_tensor_model_parallel_rank() * width
        if start + width > self.vocab_size:
            logits_SBv[..., max(self.vocab_size - start, 0) :] = -torch.inf
        return logits_SBv, bias

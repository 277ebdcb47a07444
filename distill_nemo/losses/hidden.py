"""Losses on hidden states, per token, with a learned projection where the widths differ.

Legend: S this rank's sequence, B batch, H width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from distill_nemo.losses.vocab_parallel import gather_sequence


class _HiddenStateLoss(_Loss):
    """Args: widths of student and teacher; the tensor-parallel group where the sequence is split over it."""

    def __init__(self, student_width: int, teacher_width: int, sequence_parallel_group: Any = None) -> None:
        super().__init__()
        self.group = sequence_parallel_group
        self.projection: nn.Module = nn.Identity()
        if student_width != teacher_width:
            self.projection = nn.Linear(student_width, teacher_width, bias=False)
            # Each rank sees a part of the sequence, so Megatron must sum this gradient over tensor-parallel ranks.
            self.projection.weight.sequence_parallel = sequence_parallel_group is not None  # type: ignore[union-attr]

    def forward(self, student_SBH: Any, teacher_SBH: Any) -> Tensor:
        """Loss of each token [B, S], fp32, of the whole sequence. Takes tensors or Megatron's (output, bias) pairs."""
        student, teacher = (x[0] if isinstance(x, tuple) else x for x in (student_SBH, teacher_SBH))
        loss_SB = self.per_token(self.projection(student).float(), teacher.float())
        if self.group is not None and self.group.size() > 1:
            loss_SB = gather_sequence(loss_SB, self.group)
        return loss_SB.transpose(0, 1)

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """[S, B]."""
        raise NotImplementedError


class HiddenStateCosineLoss(_HiddenStateLoss):
    """1 - cosine similarity."""

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """`1 - F.cosine_similarity(student, teacher, dim=-1)`."""
        return 1 - F.cosine_similarity(student_SBH, teacher_SBH, dim=-1)


class HiddenStateMSELoss(_HiddenStateLoss):
    """Mean squared error over the hidden dimension."""

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """`(student - teacher).square().mean(-1)`."""
        return torch.square(student_SBH - teacher_SBH).mean(-1)

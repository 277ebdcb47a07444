"""Losses between hidden states. Legend: S sequence (this rank's slice under sequence parallelism), B batch, H width."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from distill_nemo.losses.collectives import gather_sequence

Output = Tensor | tuple[Tensor, Any]  # Megatron's layers return (hidden, context)


class _HiddenStateLoss(_Loss):
    """Base of both losses. It projects, converts to fp32, gathers and transposes.

    Args:
        student_width: H of the student.
        teacher_width: H of the teacher. If it differs, `projection` maps the student's states to it (no bias) and is
            trained with the student.
        sequence_parallel_group: the ranks that share the sequence; None: every rank holds all of it.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        sequence_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = sequence_parallel_group
        self.projection = None
        if student_width != teacher_width:
            self.projection = nn.Linear(student_width, teacher_width, bias=False)
            # Each rank sees its slice of the sequence only: Megatron sums marked gradients over tensor parallel ranks.
            setattr(self.projection.weight, "sequence_parallel", sequence_parallel_group is not None)  # noqa: B010

    def forward(self, student_SBH: Output, teacher_SBH: Output) -> Tensor:
        """Return the loss of every token, [B, S] fp32, S the full sequence.

        Both arguments are [S, B, H] of any float dtype, or tuples that begin with it.

        Collectives: with a group, one all-gather of the losses in forward (`gather_sequence`); none in backward.
        """
        student = student_SBH[0] if isinstance(student_SBH, tuple) else student_SBH
        teacher = teacher_SBH[0] if isinstance(teacher_SBH, tuple) else teacher_SBH
        if self.projection is not None:
            student = self.projection(student.to(self.projection.weight.dtype))
        loss_SB = self.per_token(student.float(), teacher.detach().float())
        if self.group is not None:
            loss_SB = gather_sequence(loss_SB, self.group)
        return loss_SB.transpose(0, 1).contiguous()

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """Return the loss of every token: [S, B, H] fp32 twice, same width -> [S, B]."""
        raise NotImplementedError


class HiddenStateCosineLoss(_HiddenStateLoss):
    """`1 - cos(student, teacher)` of every token, in [0, 2]; arguments as `_HiddenStateLoss`."""

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """Return the loss of every token: [S, B, H] fp32 twice, same width -> [S, B]."""
        return 1.0 - nn.functional.cosine_similarity(student_SBH, teacher_SBH, dim=-1)


class HiddenStateMSELoss(_HiddenStateLoss):
    """`mean over H of (student - teacher)^2` of every token; arguments as `_HiddenStateLoss`."""

    def per_token(self, student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
        """Return the loss of every token: [S, B, H] fp32 twice, same width -> [S, B]."""
        return (student_SBH - teacher_SBH).square().mean(-1)

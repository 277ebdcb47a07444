"""KL(student || teacher) of vocabulary-sharded logits. Legend and conventions: `vocab_parallel.py`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses.local import gradient_buffer, implementation
from distill_nemo.losses.vocab_parallel import Steps, gathered, kl_steps


def vocab_parallel_reverse_kl(
    student_logits_SBv: Tensor,
    teacher_logits_SBv: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    *,
    overwrite_student_logits: bool = False,
) -> Tensor:
    """KL(student || teacher) of every token.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t:
    `F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)`.
    As computed: forward KL's sums with the sides changed over, `kl = mean - log Q + log P`, `mean = E_q[a - b]`.

    The gradient is `q_j (log q_j - log p_j - kl) / T = q_j (a_j - b_j - mean) / T` for the student, in its dtype, and
    none for the teacher. T^2 is left to the caller. Infinite where the student has mass that the teacher has not.
    Collectives: one all-gather, 20 bytes per token and rank, in forward; none in backward.
    Saved for backward: the inputs and four fp32 numbers per token.

    Args:
        student_logits_SBv: [S, B, v], any float dtype.
        teacher_logits_SBv: the same shape; left unchanged.
        temperature: T > 0.
        group: the ranks that share the vocabulary.
        overwrite_student_logits: as in `vocab_parallel_forward_kl`.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    args = student_logits_SBv, teacher_logits_SBv, temperature, group, overwrite_student_logits
    return _ReverseKL.apply(*args)  # pyright: ignore


def reverse_kl_steps(student_SBv: Tensor, teacher_SBv: Tensor, temperature: float) -> Steps:
    """One gather; numbers: the student's log-sum-exp, the teacher's peak and the mean of a - b."""
    kl_SB, student_lse_2SB, teacher_lse_2SB, mean_SB = yield from kl_steps(student_SBv, teacher_SBv, temperature)
    return kl_SB, (student_lse_2SB, teacher_lse_2SB[0], mean_SB)


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_SBv: Tensor,
        teacher_SBv: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        overwrite: bool,
    ) -> Tensor:
        loss_SB, numbers_SB = gathered(reverse_kl_steps(student_SBv, teacher_SBv, temperature), group)
        ctx.save_for_backward(student_SBv, teacher_SBv, *numbers_SB)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        return loss_SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None, None]:
        student_SBv, teacher_SBv, *numbers = ctx.saved_tensors
        out_SBv = gradient_buffer(student_SBv, ctx.overwrite)
        pair = student_SBv, teacher_SBv
        implementation(*pair).reverse_kl_gradient(*pair, *numbers, grad_SB, ctx.temperature, out_SBv)
        return out_SBv, None, None, None, None

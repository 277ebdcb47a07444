"""Generalised Jensen-Shannon divergence of vocabulary-sharded logits. Legend and conventions: `vocab_parallel.py`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses.local import gradient_buffer, implementation
from distill_nemo.losses.vocab_parallel import Steps, gathered, merge


def vocab_parallel_jensen_shannon(
    student_logits_SBv: Tensor,
    teacher_logits_SBv: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    beta: float = 0.5,
    *,
    overwrite_student_logits: bool = False,
) -> Tensor:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` of every token, `m = beta p + (1 - beta) q`; p teacher, q student.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t, and
    `log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))`:
    `(beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)`.

    At most `-beta log(beta) - (1 - beta) log(1 - beta)`, so log 2 for beta = 0.5, which alone is symmetric.
    It vanishes at both ends: divided by beta it tends to KL(p || q), forward KL, as beta -> 0; divided by (1 - beta)
    to KL(q || p), reverse KL, as beta -> 1. So a small beta needs a learning rate or weight 1 / beta times as large.

    The gradient is `(1 - beta) q_j (log(q_j / m_j) - KL(q || m)) / T` for the student, in its dtype, finite whatever
    the logits, and none for the teacher. T^2 is left to the caller.
    Collectives: two all-gathers, of the log-sum-exps and of the two KLs, 16 and 8 bytes per token and rank, in forward;
    none in backward. Saved for backward: the inputs and five fp32 numbers per token.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, equation 1 (GKD). TRL's
    GKDTrainer and Liger take beta = 0 and 1 for the undivided KLs; here those have names of their own.

    Args:
        student_logits_SBv: [S, B, v], any float dtype.
        teacher_logits_SBv: the same shape; left unchanged.
        temperature: T > 0.
        group: the ranks that share the vocabulary.
        beta: the teacher's share of m, 0 < beta < 1.
        overwrite_student_logits: as in `vocab_parallel_forward_kl`.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    args = student_logits_SBv, teacher_logits_SBv, temperature, group, beta, overwrite_student_logits
    return _JensenShannon.apply(*args)  # pyright: ignore


def jensen_shannon_steps(student_SBv: Tensor, teacher_SBv: Tensor, temperature: float, beta: float) -> Steps:
    """Two gathers; numbers: the log-sum-exps of student and teacher, and KL(q || m)."""
    pair = student_SBv, teacher_SBv
    local = implementation(*pair)
    lse_R4SB = yield local.kl_statistics(*pair, temperature)[:4]
    student_lse_2SB, teacher_lse_2SB = (merge(x, temperature)[0] for x in (lse_R4SB[:, :2], lse_R4SB[:, 2:]))
    kls_R2SB = yield local.jensen_shannon_kls(*pair, student_lse_2SB, teacher_lse_2SB, temperature, beta)
    teacher_kl_SB, student_kl_SB = kls_R2SB.sum(0)
    loss_SB = beta * teacher_kl_SB + (1 - beta) * student_kl_SB
    return loss_SB, (student_lse_2SB, teacher_lse_2SB, student_kl_SB)


class _JensenShannon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_SBv: Tensor,
        teacher_SBv: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        beta: float,
        overwrite: bool,
    ) -> Tensor:
        loss_SB, numbers_SB = gathered(jensen_shannon_steps(student_SBv, teacher_SBv, temperature, beta), group)
        ctx.save_for_backward(student_SBv, teacher_SBv, *numbers_SB)
        ctx.temperature, ctx.beta, ctx.overwrite = temperature, beta, overwrite
        return loss_SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        student_SBv, teacher_SBv, *numbers = ctx.saved_tensors
        out_SBv = gradient_buffer(student_SBv, ctx.overwrite)
        pair = student_SBv, teacher_SBv
        implementation(*pair).jensen_shannon_gradient(*pair, *numbers, grad_SB, ctx.temperature, ctx.beta, out_SBv)
        return out_SBv, None, None, None, None, None

"""Generalised Jensen-Shannon divergence. Legend: `divergence.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.divergence import Divergence, Statistics
from distill_nemo.losses.kernels.dispatch import find_kernel, kl_statistics
from distill_nemo.losses.kernels.eager import below, chunks, weigh


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """`beta KL(p || m) + (1 - beta) KL(q || m)` of every token, `m = beta p + (1 - beta) q`; p teacher, q student.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t, and
    `log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))`:
    `(beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)`.

    At most `-beta log(beta) - (1 - beta) log(1 - beta)`, so log 2 for beta = 0.5, which alone is symmetric.
    It vanishes at both ends. Divided by beta it tends to KL(p || q), forward KL, as beta -> 0; divided by (1 - beta)
    it tends to KL(q || p), reverse KL, as beta -> 1. So a small beta needs a learning rate or weight 1 / beta times as
    large.

    The gradient is `(1 - beta) q_j (log(q_j / m_j) - KL(q || m)) / T`, which is finite for all logits.
    Collectives: two all-gathers, of the log-sum-exps and of the two KLs, 16 and 8 bytes per token and rank.
    Saved for backward: the logits and five fp32 numbers per token.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, equation 1 (GKD). TRL's
    GKDTrainer and Liger take beta = 0 and 1 for the undivided KLs; here those have names of their own.

    Args:
        temperature: T > 0, divides the logits of both sides.
        beta: the teacher's share of m, 0 < beta < 1.

    Raises:
        ValueError: for a temperature or beta out of range.
    """

    beta: float = 0.5

    kernel = "jensen_shannon_gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie between 0 and 1, both excluded, got {self.beta}: use forward_kl or reverse_kl"
            )

    def begin(self, student_SBv: Tensor, teacher_SBv: Tensor) -> Statistics:
        """Compute the log-sum-exps of student and teacher; keep the logits for their KLs."""
        lse_4SB = kl_statistics(student_SBv, teacher_SBv, self.temperature)[:4]
        return Statistics(lse_4SB, (student_SBv, teacher_SBv))

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss; save the log-sum-exps of student and teacher, and KL(q || m). One more all-gather."""
        student_lse_2SB, _ = merge(stats.shard[:, :2], self.temperature)
        teacher_lse_2SB, _ = merge(stats.shard[:, 2:], self.temperature)
        student_SBv, teacher_SBv = stats.own
        compute_kls = find_kernel("jensen_shannon_kls", student_SBv, teacher_SBv) or jensen_shannon_kls
        kls_2SB = compute_kls(student_SBv, teacher_SBv, student_lse_2SB, teacher_lse_2SB, self.temperature, self.beta)
        teacher_kl_SB, student_kl_SB = gather(kls_2SB).sum(0)
        loss_SB = self.beta * teacher_kl_SB + (1 - self.beta) * student_kl_SB
        return loss_SB, (student_lse_2SB, teacher_lse_2SB, student_kl_SB)

    def slope(self, student_nv: Tensor, teacher_nv: Tensor, saved: tuple[Tensor, ...], grad_n1: Tensor) -> Tensor:
        """Return `grad (1 - beta) q (log(q / m) - KL(q || m)) / T`."""
        student_lse_2n, teacher_lse_2n, student_kl_n = saved
        q, _, log_p_q = _weights(student_nv, teacher_nv, student_lse_2n, teacher_lse_2n, self.temperature)
        _, log_q_m = _log_ratios(log_p_q, self.beta)
        slope = weigh(q, log_q_m.sub_(student_kl_n[:, None]))
        return slope.mul_(grad_n1 * ((1 - self.beta) / (self.temperature * student_lse_2n[1][:, None])))


def jensen_shannon_kls(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """Return the shard's part of KL(p || m) and KL(q || m): [2, S, B]."""
    student_lse_2N, teacher_lse_2N, sums = student_lse_2SB.flatten(1), teacher_lse_2SB.flatten(1), []
    for rows, (z, t) in chunks(student_SBv, teacher_SBv):
        q, p, log_p_q = _weights(z, t, student_lse_2N[:, rows], teacher_lse_2N[:, rows], temperature)
        sums.append(torch.stack([weigh(x, r).sum(-1) for x, r in zip((p, q), _log_ratios(log_p_q, beta), strict=True)]))
    totals_2SB = torch.stack([teacher_lse_2SB[1], student_lse_2SB[1]])
    return torch.cat(sums, dim=1).unflatten(1, student_SBv.shape[:-1]) / totals_2SB


def _weights(
    student_nv: Tensor, teacher_nv: Tensor, student_lse_2n: Tensor, teacher_lse_2n: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and p times their totals, over the logits, and log(p / q)."""
    (q_peak_n, q_total_n), (p_peak_n, p_total_n) = student_lse_2n, teacher_lse_2n
    a, b = below(student_nv, q_peak_n, temperature), below(teacher_nv, p_peak_n, temperature)
    log_p_q = (b - a).add_((q_total_n / p_total_n).log_()[:, None])
    return a.exp_(), b.exp_(), log_p_q


def _log_ratios(log_p_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(p / m) and log(q / m) from log(p / q).

    `log(q / m) = -log(1 - beta + beta p / q)` where p <= q, and `log(p / m) = -log(beta + (1 - beta) q / p)` elsewhere,
    the other of the two being log(p / q) away. So nothing overflows, and p = q gives 0 exactly.
    """
    share = torch.full_like(log_p_q, beta).masked_fill_(log_p_q > 0, 1 - beta)
    larger = share.mul_(log_p_q.abs().neg_().expm1_()).log1p_().neg_()
    return larger + log_p_q.clamp(max=0), larger - log_p_q.clamp(min=0)

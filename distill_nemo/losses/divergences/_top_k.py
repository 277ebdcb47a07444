"""Forward KL to a teacher of which only the k most likely tokens are known. Legend: `divergence.py`.

Also: k requested tokens, c = min(k, v) candidates of each shard, n = R c of all shards, K = min(k, n) of them kept,
m = K + 1 buckets, N = S B.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.divergence import Divergence, Statistics, write_rows
from distill_nemo.losses.kernels.eager import LMGradient, below, chunks, total_and_mean


@dataclass(frozen=True)
class TopKForwardKL(Divergence):
    """KL(teacher || student) of every token, between distributions over k tokens and one bucket for all others.

    The k tokens are the teacher's most likely (lowest column on ties) with their true probabilities. Both sides are
    normalised over the whole vocabulary. Without shards, `log_q, log_p` the log-softmax of z / T and t / T:
    `top = log_p.topk(k).indices`, `tail = lambda x: x.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)`,
    `log_q, log_p = (torch.cat([x.gather(-1, top), tail(x)], -1) for x in (log_q, log_p))`,
    `F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)`.
    A lower bound of forward KL, equal to it for k >= V and where both sides spread their tail alike.

    The gradient is `(q_j - r_j) / T`, with `r_j = p_j` for the k tokens and `r_j = p_tail q_j / q_tail` for the others.
    Collectives: one all-gather of each shard's k best (teacher's and student's logit) and the log-sum-exp of what is
    left of it, at most 8 (k + 2) bytes per token and rank.
    Saved for backward: the student's logits, 8 bytes for each of the shard's candidates and three fp32 numbers per
    token; nothing of the teacher's width.

    Args:
        temperature: T > 0, divides the logits of both sides.
        top_k: k >= 1; more than the vocabulary holds is all of it.

    Raises:
        ValueError: for a temperature or top_k out of range.
    """

    top_k: int = 1

    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise ValueError(
                f"top_k must be an int of at least 1, or None for the whole vocabulary, got {self.top_k!r}"
            )

    def begin(self, student_SBv: Tensor, teacher_SBv: Tensor) -> Statistics:
        """Find the shard's candidates, and split both sides into their logits and the log-sum-exp of the others."""
        columns, parts = [], []
        for _, (z, t) in chunks(student_SBv, teacher_SBv):
            columns.append(largest(t, min(self.top_k, t.shape[-1])))
            parts.append(torch.stack([_split(x, columns[-1], self.temperature) for x in (z, t)]))
        split_2SBc = torch.cat(parts, dim=1).unflatten(1, student_SBv.shape[:-1])
        return Statistics(split_2SBc, (torch.cat(columns).int(),))

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss.

        Save the student's log-sum-exp, columns [N, c] and r [S, B, c] of the candidates, and the tail's
        `log r_j - a_j`.
        """
        ranks_R2SBc, (columns_Nc,) = stats
        order_SBn = _ranking(ranks_R2SBc)
        peak_2SB = ranks_R2SBc[..., :-1].amax((0, -1))  # candidates and peaks of what is left
        ranks_R2SBc = _below(ranks_R2SBc, peak_2SB, self.temperature)
        a_SBm, b_SBm = _buckets(ranks_R2SBc, order_SBn, self.top_k)
        teacher_total_SB, mean_SB = total_and_mean(b_SBm, b_SBm - a_SBm)
        student_total_SB, teacher_log_SB = a_SBm.exp().sum(-1), teacher_total_SB.log()

        # -inf where the teacher has no mass in the tail, even if the student has none.
        pull_SB = b_SBm[..., -1] - teacher_log_SB - a_SBm[..., -1]
        pull_SB = pull_SB.masked_fill(b_SBm[..., -1] == -torch.inf, -torch.inf)
        a_SBc, b_SBc = ranks_R2SBc[gather.rank, ..., :-1]
        kept_SBn = torch.zeros_like(order_SBn, dtype=torch.bool).scatter_(-1, order_SBn[..., : self.top_k], True)
        kept_SBc = kept_SBn.unflatten(-1, (len(ranks_R2SBc), -1))[..., gather.rank, :]
        log_r_SBc = torch.where(kept_SBc, b_SBc - teacher_log_SB[..., None], a_SBc + pull_SB[..., None])
        student_lse_2SB = torch.stack([peak_2SB[0], student_total_SB])
        saved = student_lse_2SB, columns_Nc, log_r_SBc.exp_(), pull_SB
        return mean_SB - teacher_log_SB + student_total_SB.log(), saved

    def gradient(
        self,
        student_SBv: Tensor,
        teacher_SBv: Tensor,
        saved: tuple[Tensor, ...],
        grad_SB: Tensor,
        out_SBv: Tensor,
        lm: LMGradient | None = None,
    ) -> Tensor:
        """Write `grad (q - r) / T`, without the teacher's logits; see `Divergence.gradient`."""
        student_lse_2SB, columns_Nc, r_SBc, pull_SB = saved
        (peak_N, total_N), r_Nc, pull_N = student_lse_2SB.flatten(1), r_SBc.flatten(0, -2), pull_SB.flatten()
        for rows, (z,) in chunks(student_SBv):
            a = below(z, peak_N[rows], self.temperature)
            r = (a + pull_N[rows, None]).exp_().scatter_(-1, columns_Nc[rows].long(), r_Nc[rows])
            q, grad_n1 = a.exp_().div_(total_N[rows, None]), grad_SB.flatten()[rows, None]
            slope = q.sub_(r).mul_(grad_n1 * (1 / self.temperature))
            write_rows(out_SBv, rows, slope, grad_n1, student_SBv, lm)
        return out_SBv


def largest(logits: Tensor, num: int) -> Tensor:
    """Return the columns of the `num` largest, largest first, lowest column first on ties: [..., v] -> [..., num].

    `topk` picks any of equal values. A teacher in bf16 has many, so the choice would depend on the layout.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return ascending.mul_(2**32).sub_(columns).topk(num, dim=-1).indices


def _split(logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Return logits of `columns`, peak and total of the others: [n, v], [n, c] -> [n, c + 2]. Overwrites `logits`."""
    inside = logits.gather(-1, columns)
    peak = logits.scatter_(-1, columns, -torch.inf).amax(-1)
    total = below(logits, peak, temperature).exp_().sum(-1)
    return torch.cat([inside, peak[:, None], total[:, None]], dim=-1)


def _ranking(ranks_R2SBc: Tensor) -> Tensor:
    """Return the order of all ranks' candidates side by side, the teacher's largest logit first: [S, B, R c] int64."""
    teacher_SBn = ranks_R2SBc[:, 1, ..., :-2].movedim(0, -2).flatten(-2)
    # A stable sort takes the lowest column of the vocabulary first on ties.
    return teacher_SBn.argsort(dim=-1, descending=True, stable=True)


def _below(ranks_R2SBc: Tensor, peak_2SB: Tensor, temperature: float) -> Tensor:
    """Subtract the peak from `_split`'s c candidates and the log-sum-exp of the others: [R, 2, S, B, c + 1]."""
    left = below(ranks_R2SBc[..., :-1].clone(), peak_2SB, temperature)
    left[..., -1] += ranks_R2SBc[..., -1].log()
    return left


def _buckets(ranks_R2SBc: Tensor, order_SBn: Tensor, top_k: int) -> Tensor:
    """Merge the shards' `_below` into the buckets of the whole vocabulary, m = K + 1: [2, S, B, m]."""
    candidates_2SBn = ranks_R2SBc[..., :-1].movedim(0, -2).flatten(-2)
    candidates_2SBn = candidates_2SBn.gather(-1, order_SBn.expand_as(candidates_2SBn))
    tail_2SBn = torch.cat([candidates_2SBn[..., top_k:], ranks_R2SBc[..., -1].movedim(0, -1)], dim=-1)
    return torch.cat([candidates_2SBn[..., :top_k], tail_2SBn.logsumexp(-1, keepdim=True)], dim=-1)

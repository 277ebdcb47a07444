"""N systematic draws from the teacher: unbiased for forward KL. Legend: `loss.py`, with K = N."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.cross_entropy import local_lse
from distill_nemo.losses.divergence import Statistics
from distill_nemo.losses.stored.loss import Slope, StoredLoss, cross_entropy, points, pull
from distill_nemo.losses.stored.rows import StoredRows
from distill_nemo.losses.stored.teacher import Description


@dataclass(frozen=True)
class Sampled(StoredLoss):
    """Cross entropy against `counts / N`, less the teacher's entropy: its mean over stores is KL(teacher || student).

    `loss = sum_i counts_i / N (logsumexp(z / T) - z_i / T) - entropy`; the gradient is `(q - counts / N) / T`. The
    value of a token may be negative. Weights are neither renormalised nor rounded, so the mean of the gradient over
    stores is forward KL's. Source: random sampling knowledge distillation (RS-KD), arXiv:2503.16870; its draws are
    independent. Ours are systematic: a point in each of N equal parts of [0, 1), all of them at one distance from the
    part's beginning, through the inverse of the cumulative distribution. An id then has floor(N p) or ceil(N p) draws,
    N p on average.

    Collectives: one all-gather, 16 bytes per token and rank.
    Saved: four fp32 numbers per token; nothing of the vocabulary's width.
    """

    def choose(
        self, logits_nv: Tensor, described: Description, uniform_n: Tensor, gather: Gather, vocab_start: int
    ) -> dict[str, Tensor]:
        """Draw: `ids` in ascending order, then -1, and `counts`, [n, K] int32. One all-gather, 4 K bytes a token."""
        ids_nK = gather(self._own_draws(described, uniform_n, gather.rank, vocab_start)).amax(0)
        slot_nK = torch.zeros_like(ids_nK, dtype=torch.int64)
        slot_nK[:, 1:] = (ids_nK[:, 1:] != ids_nK[:, :-1]).cumsum(-1)
        counts_nK = torch.zeros_like(ids_nK).scatter_add_(-1, slot_nK, torch.ones_like(ids_nK))
        return {"ids": torch.full_like(ids_nK, -1).scatter_(-1, slot_nK, ids_nK), "counts": counts_nK}

    def _own_draws(self, described: Description, uniform_n: Tensor, rank: int, vocab_start: int) -> Tensor:
        """Return the id of every draw that falls into this rank's shard, -1 for the others: [n, K] int32."""
        sums_nv, share_Rn = described.weights_nv.cumsum(-1), described.share_Rn
        parts_K = torch.arange(self.num, dtype=torch.float64, device=uniform_n.device)
        points_nK = (uniform_n.double()[:, None] + parts_K) / self.num
        # A point that rounding has put beyond the last shard, or column, with any probability belongs to that one.
        stop_Rn = share_Rn.cumsum(0)
        last_n = (stop_Rn < stop_Rn[-1]).sum(0)
        owner_nK = (stop_Rn[..., None] <= points_nK).sum(0).minimum(last_n[:, None])
        last_n1 = torch.searchsorted(sums_nv, sums_nv[:, -1:].contiguous())
        scale_n = sums_nv[:, -1] / share_Rn[rank]
        start_n = stop_Rn[rank] - share_Rn[rank] if rank else torch.zeros_like(scale_n)
        column_nK = torch.searchsorted(sums_nv, (points_nK - start_n[:, None]) * scale_n[:, None], right=True)
        return (column_nK.minimum(last_n1) + vocab_start).where(owner_nK == rank, -1).int()

    def begin(self, student_SBv: Tensor, teacher: StoredRows) -> Statistics:
        """Compute the shard's log-sum-exp and, of its ids, `loss.pull`."""
        lse_2n = local_lse(student_SBv, self.temperature)
        inside_nK, _, at_nK = points(student_SBv, teacher)
        pulls = pull(self._weights(inside_nK, teacher), at_nK, lse_2n[0], self.temperature)
        return Statistics(torch.stack([*lse_2n, *pulls]), (teacher["entropy"],))

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss; save the student's log-sum-exp and the sum of the weights."""
        stats_R4n, (entropy_n,) = stats
        lse_2n, _ = merge(stats_R4n[:, :2], self.temperature)
        peak_Rn, _, pull_Rn, mass_Rn = stats_R4n.unbind(1)
        return cross_entropy(lse_2n, peak_Rn, pull_Rn, mass_Rn, self.temperature) - entropy_n, (lse_2n, mass_Rn.sum(0))

    def slope(self, student_nv: Tensor, teacher: StoredRows, saved: tuple[Tensor, ...], grad_n: Tensor) -> Slope:
        """Return `grad (mass q - counts / N) / T`."""
        (peak_n, total_n), mass_n = saved
        grad_n = grad_n / self.temperature
        value_nK = -self._weights(teacher.columns()[0], teacher) * grad_n[:, None]
        return Slope(peak_n, grad_n * mass_n / total_n, value_nK)

    def _weights(self, inside_nK: Tensor, teacher: StoredRows) -> Tensor:
        return torch.where(inside_nK, teacher["counts"] / self.num, 0.0)

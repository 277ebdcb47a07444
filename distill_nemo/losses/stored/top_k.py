"""The teacher's k most likely ids, and one bucket for all others. Legend: `loss.py`, with K = k."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.cross_entropy import local_lse
from distill_nemo.losses.divergence import Statistics
from distill_nemo.losses.divergences._top_k import largest
from distill_nemo.losses.kernels.eager import softmax, weigh
from distill_nemo.losses.stored.loss import Slope, StoredLoss, cross_entropy, points, pull
from distill_nemo.losses.stored.rows import StoredRows
from distill_nemo.losses.stored.teacher import Description


@dataclass(frozen=True)
class TopK(StoredLoss):
    """`divergences.TopKForwardKL`, from what a store keeps: probabilities of k ids at T, and that of all others.

    Both sides are normalised over the whole vocabulary; the gradient is `(q_j - p_j) / T` for the k ids and
    `(q_j - p_tail q_j / q_tail) / T` for the others.

    Collectives: one all-gather, 24 bytes per token and rank.
    Saved: five fp32 numbers per token; nothing of the vocabulary's width.
    """

    def choose(
        self, logits_nv: Tensor, described: Description, uniform_n: Tensor, gather: Gather, vocab_start: int
    ) -> dict[str, Tensor]:
        """Return `ids`, the most likely first (the lowest first on ties), `logprobs` and `tail`.

        One all-gather of the shards' k best, 16 k + 8 bytes a token.
        """
        columns_nc = largest(logits_nv, min(self.num, logits_nv.shape[-1]))
        logits_nc = logits_nv.gather(-1, columns_nc).double()
        rest_n = described.weights_nv.scatter(-1, columns_nc, 0.0).sum(-1)
        rest_n = weigh(described.share_Rn[gather.rank], rest_n / described.weights_nv.sum(-1))
        own = torch.cat([logits_nc, (columns_nc + vocab_start).double(), rest_n[:, None]], dim=-1)
        ranks_Rnm = gather(own)
        num = columns_nc.shape[-1]
        logits_nC, ids_nC = (x.movedim(0, 1).flatten(1) for x in ranks_Rnm[..., :-1].split(num, dim=-1))
        order_nC = logits_nC.argsort(dim=-1, descending=True, stable=True)
        peak_n, total_n = described.lse_2n
        logprobs_nC = (logits_nC - peak_n[:, None]) / self.temperature - total_n.log()[:, None]
        (best_nK, others_nC), (ids_nK, _) = (
            x.gather(-1, order_nC).tensor_split([self.num], dim=-1) for x in (logprobs_nC, ids_nC)
        )
        tail_n = ranks_Rnm[..., -1].sum(0) + others_nC.exp().sum(-1)
        none_nK = best_nK == -torch.inf
        return {
            "ids": ids_nK.masked_fill(none_nK, -1).int(),
            "logprobs": best_nK.masked_fill(none_nK, 0.0).float(),
            "tail": tail_n.log().float(),
        }

    def begin(self, student_SBv: Tensor, teacher: StoredRows) -> Statistics:
        """Compute the log-sum-exps of the shard and of its columns without stored ids, and `loss.pull` of the ids."""
        inside_nK, column_nK, at_nK = points(student_SBv, teacher)
        _hide(student_SBv, inside_nK, column_nK)
        others_2n = local_lse(student_SBv, self.temperature)
        others_2n[0].clamp_(min=torch.finfo(torch.float32).min)  # a shard, or a vocabulary, may have no others
        student_SBv.scatter_reduce_(-1, column_nK, at_nK, "amax")  # -inf, where an id is another rank's, has no effect
        peak_n = torch.maximum(others_2n[0], at_nK.amax(-1))
        total_n = others_2n[1] * ((others_2n[0] - peak_n) / self.temperature).exp()
        total_n += ((at_nK - peak_n[:, None]) / self.temperature).exp().sum(-1)
        p_nK, constant_n = _probabilities(teacher)
        pulls = pull(torch.where(inside_nK, p_nK, 0.0), at_nK, peak_n, self.temperature)
        own = constant_n, teacher["tail"].exp()
        return Statistics(torch.stack([peak_n, total_n, *others_2n, *pulls]), own)

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss; save the student's log-sum-exps of all and of the other columns, and the total of p."""
        stats_R6n, (constant_n, p_tail_n) = stats
        lse_2n, _ = merge(stats_R6n[:, :2], self.temperature)
        others_2n, _ = merge(stats_R6n[:, 2:4], self.temperature)
        peak_Rn, *_, pull_Rn, mass_Rn = stats_R6n.unbind(1)
        loss_n = constant_n + cross_entropy(lse_2n, peak_Rn, pull_Rn, mass_Rn, self.temperature)
        log_q_tail_n = others_2n[1].log() - lse_2n[1].log() + (others_2n[0] - lse_2n[0]) / self.temperature
        return loss_n - weigh(p_tail_n, log_q_tail_n), (lse_2n, others_2n, mass_Rn.sum(0) + p_tail_n)

    def slope(self, student_nv: Tensor, teacher: StoredRows, saved: tuple[Tensor, ...], grad_n: Tensor) -> Slope:
        """Return `grad (mass q - r) / T`, with r = p for the ids, which are hidden, and p_tail q / q_tail elsewhere."""
        lse_2n, (peak_n, total_n), mass_n = saved
        grad_n = grad_n / self.temperature
        inside_nK, column_nK, at_nK = points(student_nv, teacher)
        q_nK = softmax(at_nK, lse_2n, self.temperature)
        p_nK = torch.where(inside_nK, _probabilities(teacher)[0], 0.0)
        _hide(student_nv, inside_nK, column_nK)
        q_scale_n = mass_n * ((peak_n - lse_2n[0]) / self.temperature).exp() / lse_2n[1]
        r_scale_n = torch.where(total_n > 0, teacher["tail"].exp() / total_n, 0.0)
        values_nK = (mass_n[:, None] * q_nK - p_nK) * grad_n[:, None]
        return Slope(peak_n, grad_n * (q_scale_n - r_scale_n), values_nK, hidden=True)


def _hide(logits_nv: Tensor, inside_nK: Tensor, column_nK: Tensor) -> None:
    """Write -inf where this rank has a stored id."""
    hiding_nK = torch.where(inside_nK, -torch.inf, torch.inf).to(logits_nv.dtype)
    logits_nv.scatter_reduce_(-1, column_nK, hiding_nK, "amin")


def _probabilities(teacher: StoredRows) -> tuple[Tensor, Tensor]:
    """Return p of the ids (0 for none), [n, K], and `sum p log p` with the bucket, [n]."""
    p_nK = teacher["logprobs"].exp().masked_fill(teacher["ids"] < 0, 0.0)
    tail_n = teacher["tail"]
    return p_nK, weigh(p_nK, teacher["logprobs"]).sum(-1) + weigh(tail_n.exp(), tail_n)

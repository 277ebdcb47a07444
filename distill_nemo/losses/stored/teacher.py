"""The teacher's side of a store: its distribution's description, which every codec keeps.

Legend: n some tokens, v this rank's vocabulary shard, R ranks that share the vocabulary, T the store's temperature.
Computed in fp64: two layouts differ only by the rounding of the logits themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.cross_entropy import label_logits
from distill_nemo.losses.kernels.eager import weigh
from distill_nemo.losses.metrics import entropy


class Description(NamedTuple):
    """The teacher's distribution over the vocabulary, of which each rank has its shard."""

    weights_nv: Tensor  # exp((logits - the shard's peak) / T)
    share_Rn: Tensor  # probability of each shard at T
    lse_2n: Tensor  # at T, over the vocabulary: peak and total
    numbers: dict[str, Tensor]  # to be stored


@torch.no_grad()
def describe(logits_nv: Tensor, labels_n: Tensor, temperature: float, gather: Gather, vocab_start: int) -> Description:
    """Describe the teacher's distribution; no logits leave their rank.

    Collectives: one all-gather, at most 56 bytes per token and rank.

    Args:
        logits_nv: the teacher's logits; padding holds -inf.
        labels_n: ids of the tokens that follow.
        temperature: T.
        gather: over the ranks that share the vocabulary.
        vocab_start: global index of this rank's first column.

    Returns:
        The `numbers` are `entropy` at T, `label_logprob` at temperature 1, `entropy_at_1` if T is not 1, [n] fp32, and
        `top1`, the most likely id (the lowest on ties), [n] int32. They are the same on every rank.
    """
    peak_n, top_n = logits_nv.max(-1)
    below_nv = logits_nv.double() - peak_n.masked_fill(peak_n == -torch.inf, 0.0)[:, None]
    weights_nv, *sums = _sums(below_nv, temperature)
    if temperature != 1:
        sums += _sums(below_nv, 1.0)[1:]
    label_n = label_logits(logits_nv, labels_n, vocab_start)
    stats_Rmn = gather(torch.stack([peak_n.double(), top_n + vocab_start, label_n, *sums]))
    peak_Rn, top_Rn, label_Rn, *sums = stats_Rmn.unbind(1)
    stats_R3n, at_1_R3n = (torch.stack([peak_Rn, *sums[i : i + 2]], 1) for i in (0, len(sums) - 2))
    lse_2n, share_Rn = merge(stats_R3n[:, :2], temperature)
    (peak_n, total_at_1_n), _ = merge(at_1_R3n[:, :2], 1.0)
    numbers = {
        "entropy": entropy(stats_R3n, temperature).float(),
        "label_logprob": (label_Rn.sum(0) - peak_n - total_at_1_n.log()).float(),
        "top1": top_Rn.gather(0, peak_Rn.argmax(0, keepdim=True))[0].int(),
    }
    if temperature != 1:
        numbers["entropy_at_1"] = entropy(at_1_R3n, 1.0).float()
    return Description(weights_nv, share_Rn, lse_2n, numbers)


def _sums(below_nv: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights exp(below / T), their total, and the mean of below / T under them (0 without any weight)."""
    weights_nv = (below_nv / temperature).exp_()
    total_n = weights_nv.sum(-1)
    return weights_nv, total_n, weigh(weights_nv, below_nv).sum(-1) / (temperature * total_n.clamp(min=1.0))

"""Cross entropy of vocabulary-sharded logits, at temperature 1. Legend: `divergence.py`."""

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.kernels.dispatch import find_kernel, kl_statistics
from distill_nemo.losses.kernels.eager import LMGradient


@torch.no_grad()
def vocab_parallel_cross_entropy(
    logits_SBv: Tensor, labels_SB: Tensor, group: dist.ProcessGroup | None = None, vocab_start: int = 0
) -> Tensor:
    """Return `F.cross_entropy(logits, labels, reduction="none")` of every token. No gradient.

    Collectives: one all-gather, 12 bytes per token and rank.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    local = torch.stack([*local_lse(logits_SBv), label_logits(logits_SBv, labels_SB, vocab_start)])
    stats_R3SB = Gather(group)(local)
    return cross_entropy(merge(stats_R3SB[:, :2], 1.0)[0], stats_R3SB[:, 2])


def cross_entropy(lse_2SB: Tensor, label_RSB: Tensor) -> Tensor:
    """Return the loss of each token from the log-sum-exp over the vocabulary and every rank's `label_logits`."""
    peak_SB, total_SB = lse_2SB
    return total_SB.log() + (peak_SB - label_RSB.sum(0))


def local_lse(logits_SBv: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-sum-exp over the shard, as peak and total: [2, S, B] fp32."""
    kernel = find_kernel("log_sum_exp", logits_SBv)
    if kernel is not None:
        return kernel(logits_SBv, temperature)
    return kl_statistics(logits_SBv, logits_SBv, temperature)[:2]


def label_logits(logits_SBv: Tensor, labels_SB: Tensor, vocab_start: int) -> Tensor:
    """Return the label's logit if it is in this shard, else 0: [S, B] fp32. The sum over ranks is the logit."""
    inside_SB, column_SB = columns_of(labels_SB, vocab_start, logits_SBv.shape[-1])
    found_SB = logits_SBv.gather(-1, column_SB[..., None])[..., 0].float()
    return torch.where(inside_SB, found_SB, 0.0)


def lm_gradient(labels_n: Tensor, vocab_start: int, width: int, lse_2n: Tensor, grad_n: Tensor) -> LMGradient:
    """Return the LM loss's gradient. Labels index the whole vocabulary, of which this shard has `width` columns."""
    inside_n, column_n = columns_of(labels_n, vocab_start, width)
    return LMGradient(column_n.where(inside_n, -1), lse_2n, grad_n)


def columns_of(ids: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return True for the ids that are in this shard, and their columns there (0 for the others)."""
    column = ids - vocab_start
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)

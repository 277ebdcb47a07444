"""Cross entropy of vocabulary-sharded logits, at temperature 1. Legend: `vocab_parallel.py`; n some tokens."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.eager import softmax
from distill_nemo.losses.local import implementation
from distill_nemo.losses.vocab_parallel import gather, merge


@torch.no_grad()
def vocab_parallel_cross_entropy(
    logits_SBv: Tensor, labels_SB: Tensor, group: dist.ProcessGroup | None = None, vocab_start: int = 0
) -> Tensor:
    """`F.cross_entropy(logits, labels, reduction="none")` of every token, at temperature 1. No gradient.

    Collectives: one all-gather, 12 bytes per token and rank.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    local = torch.stack([*local_lse(logits_SBv), label_logits(logits_SBv, labels_SB, vocab_start)])
    stats_R3SB = gather(local, group)
    return cross_entropy(merge(stats_R3SB[:, :2], 1.0)[0], stats_R3SB[:, 2])


def cross_entropy(lse_2SB: Tensor, label_RSB: Tensor) -> Tensor:
    """The loss of each token from the log-sum-exp over the vocabulary and every rank's `label_logits`."""
    peak_SB, total_SB = lse_2SB
    return total_SB.log() + (peak_SB - label_RSB.sum(0))


def local_lse(logits_SBv: Tensor) -> Tensor:
    """Log-sum-exp over the shard, as peak and total: [2, S, B] fp32."""
    return implementation(logits_SBv, logits_SBv).kl_statistics(logits_SBv, logits_SBv, 1.0)[:2]


def label_logits(logits_SBv: Tensor, labels_SB: Tensor, vocab_start: int) -> Tensor:
    """The label's logit where it is in this shard, else 0: [S, B] fp32. Summed over ranks it is the label's logit."""
    inside_SB, column_SB = _columns(labels_SB, vocab_start, logits_SBv.shape[-1])
    found_SB = logits_SBv.gather(-1, column_SB[..., None])[..., 0].float()
    return torch.where(inside_SB, found_SB, 0.0)


class CrossEntropy(NamedTuple):
    """What the gradient of some tokens' LM loss needs besides their logits: `grad (softmax(logits) - [j = label])`."""

    column_n: Tensor  # the label's in this shard; -1 where it is in another
    lse_2n: Tensor  # over the whole vocabulary
    grad_n: Tensor  # of each token's loss

    @staticmethod
    def of(labels_n: Tensor, vocab_start: int, width: int, lse_2n: Tensor, grad_n: Tensor) -> "CrossEntropy":
        """Of labels of the whole vocabulary."""
        inside_n, column_n = _columns(labels_n, vocab_start, width)
        return CrossEntropy(column_n.where(inside_n, -1), lse_2n, grad_n)


def add_cross_entropy_gradient(logits_nv: Tensor, lm: CrossEntropy, out_nv: Tensor) -> None:
    """Add it to `out`. Overwrites the logits; both fp32."""
    out_nv.add_(softmax(logits_nv, lm.lse_2n, 1.0).mul_(lm.grad_n[:, None]))
    at_label_n = torch.where(lm.column_n < 0, 0.0, -lm.grad_n)
    out_nv.scatter_add_(-1, lm.column_n.clamp(min=0)[:, None], at_label_n[:, None])


def _columns(labels: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each label is in this shard, and its column there (0 where it is not)."""
    column = labels - vocab_start
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)

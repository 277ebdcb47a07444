"""Metrics that compare a student with its teacher, from logits, without gradients. Legend: `divergence.py`."""

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.cross_entropy import vocab_parallel_cross_entropy
from distill_nemo.losses.divergences.forward_kl import ForwardKL
from distill_nemo.losses.kernels.eager import below, chunks, total_and_mean, weigh

METRICS = ("lm_loss", "forward_kl", "top1_agreement", "teacher_entropy", "teacher_lm_loss")


@torch.no_grad()
def metrics_against_teacher(
    student_logits_SBv: Tensor,
    teacher_logits_SBv: Tensor,
    labels_SB: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> dict[str, Tensor]:
    """Return `METRICS` of every token at temperature 1: [S, B] fp32, the same on every rank.

    Collectives: one all-gather per metric.
    """
    pair = student_logits_SBv, teacher_logits_SBv
    return {
        "lm_loss": vocab_parallel_cross_entropy(student_logits_SBv, labels_SB, group, vocab_start),
        "forward_kl": ForwardKL()(*pair, group),
        "top1_agreement": vocab_parallel_top1_agreement(*pair, group),
        "teacher_entropy": vocab_parallel_entropy(teacher_logits_SBv, group),
        "teacher_lm_loss": vocab_parallel_cross_entropy(teacher_logits_SBv, labels_SB, group, vocab_start),
    }


@torch.no_grad()
def vocab_parallel_top1_agreement(
    student_logits_SBv: Tensor, teacher_logits_SBv: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return 1.0 where student and teacher have the same most likely token (lowest index on ties), else 0.0.

    Without shards: `(z.argmax(-1) == t.argmax(-1)).float()`. Collectives: one all-gather.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    student_SB, teacher_SB = vocab_parallel_top1((student_logits_SBv, teacher_logits_SBv), group)
    return (student_SB == teacher_SB).float()


@torch.no_grad()
def vocab_parallel_top1(logits_SBv: tuple[Tensor, ...], group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Return the most likely id of every token (lowest on ties), [S, B] int64 for each of the logits.

    Without shards: `z.argmax(-1)`. Collectives: one all-gather.
    """
    best = [x.argmax(-1, keepdim=True) for x in logits_SBv]
    values = [x.gather(-1, i) for x, i in zip(logits_SBv, best, strict=True)]
    # fp32 holds a column index exactly up to 2^24.
    top_RmSB = Gather(group)(torch.stack([x.squeeze(-1).float() for x in (*values, *best)]))
    values_RmSB, column_RmSB = top_RmSB.chunk(2, dim=1)
    rank_mSB = values_RmSB.argmax(0)  # the first, so the lowest, rank on ties
    column_mSB = column_RmSB.gather(0, rank_mSB[None])[0].long()
    return tuple(rank_mSB * logits_SBv[0].shape[-1] + column_mSB)


@torch.no_grad()
def vocab_parallel_entropy(logits_SBv: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the entropy in nats of the softmax of every token: `Categorical(logits=z).entropy()` without shards.

    Collectives: one all-gather.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    stats = []
    for _, (x,) in chunks(logits_SBv):
        peak = x.amax(-1)
        x = below(x, peak, 1.0)
        stats.append(torch.stack([peak, *total_and_mean(x, x)]))
    return entropy(Gather(group)(torch.cat(stats, dim=1).unflatten(1, logits_SBv.shape[:-1])), 1.0)


def entropy(stats_R3SB: Tensor, temperature: float) -> Tensor:
    """Merge the shards' peak, total and mean of `(x - peak) / T` (`kernels.eager.total_and_mean`) into the entropy."""
    (peak_SB, total_SB), share_RSB = merge(stats_R3SB[:, :2], temperature)
    lower_RSB = stats_R3SB[:, 0] - peak_SB  # of the shards' peaks
    return total_SB.log() - weigh(share_RSB, stats_R3SB[:, 2] + lower_RSB / temperature).sum(0)

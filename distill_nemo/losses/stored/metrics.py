"""Metrics that compare a student with stored targets, without gradients. Legend: `loss.py`."""

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.cross_entropy import vocab_parallel_cross_entropy
from distill_nemo.losses.divergence import LogitsLoss
from distill_nemo.losses.metrics import vocab_parallel_top1
from distill_nemo.losses.stored.rows import StoredRows


@torch.no_grad()
def metrics_against_stored(
    student_nv: Tensor,
    stored: StoredRows,
    labels_n: Tensor,
    loss: LogitsLoss[StoredRows],
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Return `losses.metrics.METRICS` of every token, [n] fp32, the same on every rank.

    `forward_kl` is the codec's loss, at the store's temperature; all else is at temperature 1.

    Collectives: three all-gathers.
    """
    gather = Gather(group)
    stats = loss.begin(student_nv, stored)
    kl_n, _ = loss.finish(stats._replace(shard=gather(stats.shard)), gather)
    (top1_n,) = vocab_parallel_top1((student_nv,), group)
    return {
        "lm_loss": vocab_parallel_cross_entropy(student_nv, labels_n, group, stored.vocab_start),
        "forward_kl": kl_n,
        "top1_agreement": (top1_n == stored["top1"]).float(),
        "teacher_entropy": stored["entropy" if loss.temperature == 1 else "entropy_at_1"],
        "teacher_lm_loss": -stored["label_logprob"],
    }

"""What can be measured of a student beside its teacher, from logits. Legend: `vocab_parallel.py`."""

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.cross_entropy import vocab_parallel_cross_entropy
from distill_nemo.losses.vocab_parallel import (
    vocab_parallel_entropy,
    vocab_parallel_forward_kl,
    vocab_parallel_top1_agreement,
)

FIGURES = ("lm_loss", "forward_kl", "top1_agreement", "teacher_entropy", "teacher_lm_loss")


@torch.no_grad()
def figures_against_teacher(
    student_logits_SBv: Tensor,
    teacher_logits_SBv: Tensor,
    labels_SB: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> dict[str, Tensor]:
    """By name, [S, B] fp32 each, the same on every rank, at temperature 1 whatever is trained. No gradient.

    Collectives: one all-gather a figure.
    """
    pair = student_logits_SBv, teacher_logits_SBv
    return {
        "lm_loss": vocab_parallel_cross_entropy(student_logits_SBv, labels_SB, group, vocab_start),
        "forward_kl": vocab_parallel_forward_kl(*pair, 1.0, group),
        "top1_agreement": vocab_parallel_top1_agreement(*pair, group),
        "teacher_entropy": vocab_parallel_entropy(teacher_logits_SBv, group),
        "teacher_lm_loss": vocab_parallel_cross_entropy(teacher_logits_SBv, labels_SB, group, vocab_start),
    }

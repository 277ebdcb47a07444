"""Cross entropy against some ids of the vocabulary, of which a store knows the teacher's probability.

With q = softmax(student / T) over the whole vocabulary and the stored p_i of K ids:
`loss = sum_i p_i log(1 / q_i) + constant`, where the constant does not depend on the student.

Legend: n some tokens, v this rank's vocabulary shard, R ranks that share the vocabulary. An id belongs to one rank,
which alone reads its logit. Everything is in fp32. As in `kernels/eager.py`, a log-sum-exp is two numbers, and no
subtracted number holds an offset that is common to all logits.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.divergence import LogitsLoss
from distill_nemo.losses.kernels.dispatch import softmax_gradient
from distill_nemo.losses.kernels.eager import LMGradient, softmax, weigh
from distill_nemo.losses.stored.rows import StoredRows
from distill_nemo.losses.stored.teacher import Description


class Slope(NamedTuple):
    """A gradient of logits z, `scale exp((z - peak) / T)`, plus `values` at the columns of the stored ids."""

    peak_n: Tensor
    scale_n: Tensor
    value_nK: Tensor
    hidden: bool = False  # the first part leaves those columns out: z is -inf there


@dataclass(frozen=True)
class StoredLoss(LogitsLoss[StoredRows]):
    """Loss of every token against stored targets.

    Args:
        temperature: T of the store.
        num: K.

    Raises:
        ValueError: for a temperature or number out of range.
    """

    num: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num < 1:
            raise ValueError(f"num must be at least 1, got {self.num}")

    @abstractmethod
    def choose(
        self, logits_nv: Tensor, described: Description, uniform_n: Tensor, gather: Gather, vocab_start: int
    ) -> dict[str, Tensor]:
        """Return the fields that a store keeps of the teacher, see `stored.encode`. One all-gather."""

    @abstractmethod
    def slope(self, student_nv: Tensor, teacher: StoredRows, saved: tuple[Tensor, ...], grad_n: Tensor) -> Slope:
        """Return `grad` times the derivative of the loss. The student's logits may be overwritten where it hides."""

    def gradient(
        self,
        student_SBv: Tensor,
        teacher: StoredRows,
        saved: tuple[Tensor, ...],
        grad_SB: Tensor,
        out_SBv: Tensor,
        lm: LMGradient | None = None,
    ) -> Tensor:
        """Write the gradient of [n, v]; see `LogitsLoss.gradient`. `student_SBv` may be `out`."""
        _, column_nK, at_nK = points(student_SBv, teacher)
        peak_n, scale_n, value_nK, hidden = self.slope(student_SBv, teacher, saved, grad_SB)
        scale_n, value_nK = scale_n.masked_fill(grad_SB == 0, 0.0), value_nK.masked_fill(grad_SB[:, None] == 0, 0.0)
        second = None
        if lm is not None:
            if hidden:
                value_nK = value_nK + softmax(at_nK, lm.lse_2n, 1.0).mul_(lm.grad_n[:, None])
            at_label_n = torch.where(lm.column_n < 0, 0.0, -lm.grad_n)
            column_nK = torch.cat([column_nK, lm.column_n.clamp(min=0)[:, None]], dim=-1)
            value_nK = torch.cat([value_nK, at_label_n[:, None]], dim=-1)
            lm_peak_n, lm_scale_n = lm.lse_2n[0], lm.grad_n / lm.lse_2n[1]
            if self.temperature == 1:
                scale_n = scale_n + lm_scale_n * (peak_n - lm_peak_n).exp()
            else:
                second = lm_peak_n, lm_scale_n
        return softmax_gradient(student_SBv, self.temperature, peak_n, scale_n, second, column_nK, value_nK, out_SBv)


def points(logits_nv: Tensor, stored: StoredRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return which stored ids are this rank's, their columns (0 for others) and logits (-inf for others): [n, K]."""
    inside_nK, column_nK = stored.columns()
    return inside_nK, column_nK, logits_nv.gather(-1, column_nK).float().masked_fill_(~inside_nK, -torch.inf)


def pull(p_nK: Tensor, at_nK: Tensor, peak_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return this rank's `sum p (z - peak) / T` over the ids with logits `at`, and the sum of their p."""
    below_nK = (at_nK - peak_n[:, None]) / temperature
    return weigh(p_nK, below_nK).sum(-1), p_nK.sum(-1)


def cross_entropy(lse_2n: Tensor, peak_Rn: Tensor, pull_Rn: Tensor, mass_Rn: Tensor, temperature: float) -> Tensor:
    """Return `sum p (log(total) - (z - peak) / T)` over all ranks' ids, from each rank's `pull` at its own peak."""
    peak_n, total_n = lse_2n
    lower_Rn = weigh(mass_Rn, (peak_Rn - peak_n) / temperature)
    return mass_Rn.sum(0) * total_n.log() - (pull_Rn + lower_Rn).sum(0)

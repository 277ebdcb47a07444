"""KL(student || teacher). Legend: `divergence.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.divergence import Divergence, Statistics
from distill_nemo.losses.divergences.forward_kl import merge_kl
from distill_nemo.losses.kernels.dispatch import kl_statistics
from distill_nemo.losses.kernels.eager import below


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) of every token; infinite if the student has mass where the teacher has none.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t:
    `F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)`.
    It is computed from forward KL's sums with the sides exchanged, `kl = mean - log Q + log P`, `mean = E_q[a - b]`.

    The gradient is `q_j (log q_j - log p_j - kl) / T = q_j (a_j - b_j - mean) / T`.
    Collectives: one all-gather, 20 bytes per token and rank.
    Saved for backward: the logits and four fp32 numbers per token.
    """

    kernel = "reverse_kl_gradient"

    def begin(self, student_SBv: Tensor, teacher_SBv: Tensor) -> Statistics:
        """Compute `kernels.eager.kl_statistics` of student and teacher."""
        return Statistics(kl_statistics(student_SBv, teacher_SBv, self.temperature))

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss; save the student's log-sum-exp, the teacher's peak and the mean of a - b."""
        kl_SB, student_lse_2SB, teacher_lse_2SB, mean_SB = merge_kl(stats.shard, self.temperature)
        return kl_SB, (student_lse_2SB, teacher_lse_2SB[0], mean_SB)

    def slope(self, student_nv: Tensor, teacher_nv: Tensor, saved: tuple[Tensor, ...], grad_n1: Tensor) -> Tensor:
        """Return `grad q (a - b - mean) / T`."""
        (peak_n, total_n), teacher_peak_n, mean_n = saved
        a, b = below(student_nv, peak_n, self.temperature), below(teacher_nv, teacher_peak_n, self.temperature)
        surplus = torch.sub(a, b, out=b).sub_(mean_n[:, None])
        weights = a.exp_()
        slope = surplus.mul_(weights).masked_fill_(weights == 0, 0.0)  # padding: 0 * nan
        return slope.mul_(grad_n1 * (1 / (self.temperature * total_n[:, None])))

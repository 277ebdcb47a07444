"""KL(teacher || student). Legend: `divergence.py`."""

from dataclasses import dataclass

from torch import Tensor

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.divergence import Divergence, Statistics
from distill_nemo.losses.kernels.dispatch import kl_statistics
from distill_nemo.losses.kernels.eager import softmax, weigh


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) of every token.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t:
    `F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)`.
    It is computed from the totals P and Q of teacher and student as `kl = E_p[b - a] - log P + log Q`, in which no
    number contains an offset common to all logits. The shards' peaks, totals and means give those of the vocabulary.

    The gradient is `(q - p) / T`.
    Collectives: one all-gather of both peaks and totals and the mean, 20 bytes per token and rank.
    Saved for backward: the logits and four fp32 numbers per token.
    """

    kernel = "forward_kl_gradient"

    def begin(self, student_SBv: Tensor, teacher_SBv: Tensor) -> Statistics:
        """Compute `kernels.eager.kl_statistics` of teacher and student."""
        return Statistics(kl_statistics(teacher_SBv, student_SBv, self.temperature))

    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss; save the log-sum-exps of student and teacher."""
        kl_SB, teacher_lse_2SB, student_lse_2SB, _ = merge_kl(stats.shard, self.temperature)
        return kl_SB, (student_lse_2SB, teacher_lse_2SB)

    def slope(self, student_nv: Tensor, teacher_nv: Tensor, saved: tuple[Tensor, ...], grad_n1: Tensor) -> Tensor:
        """Return `grad (q - p) / T`."""
        student_lse_2n, teacher_lse_2n = saved
        q = softmax(student_nv, student_lse_2n, self.temperature)
        p = softmax(teacher_nv, teacher_lse_2n, self.temperature)
        return q.sub_(p).mul_(grad_n1 * (1 / self.temperature))


def merge_kl(stats_R5SB: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge `kl_statistics` of the shards: KL(p || q), the log-sum-exps of p and q, and the mean, of the vocabulary."""
    p_lse_2SB, share_RSB = merge(stats_R5SB[:, :2], temperature)
    q_lse_2SB, _ = merge(stats_R5SB[:, 2:4], temperature)
    lower_RSB = (stats_R5SB[:, 0] - p_lse_2SB[0]) - (stats_R5SB[:, 2] - q_lse_2SB[0])  # of the shards' peaks
    mean_SB = weigh(share_RSB, stats_R5SB[:, 4] + lower_RSB / temperature).sum(0)
    return mean_SB - p_lse_2SB[1].log() + q_lse_2SB[1].log(), p_lse_2SB, q_lse_2SB, mean_SB

"""Divergence between student and teacher: a loss of every token, from logits whose vocabulary is sharded.

Each is a file in `divergences/`. To use one: `ForwardKL(temperature=2.0)(student_logits, teacher_logits, group)`.

Legend: S sequence, B batch, v this rank's vocabulary shard, R ranks that share the vocabulary, n some tokens.
With temperature T: q = softmax(student / T), p = softmax(teacher / T) over the whole vocabulary; a and b are student
and teacher logits less their peaks, divided by T (`kernels/eager.py`). Everything is computed in fp32.
Padded columns hold -inf on both sides and have no effect, even if they fill a rank's shard.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.kernels.dispatch import find_kernel
from distill_nemo.losses.kernels.eager import LMGradient, add_lm_gradient, chunks


class Statistics(NamedTuple):
    """Sums of one shard, between `begin` and `finish`."""

    shard: Tensor  # [..., S, B] of this rank; once gathered, [R, ..., S, B]
    own: tuple[Tensor, ...] = ()  # stays on this rank


@dataclass(frozen=True)
class LogitsLoss[Teacher](ABC):
    """Loss of every token between a student's logits and a teacher. The caller multiplies by `factor`.

    `begin`, one all-gather, `finish` give the loss; `gradient` is that of the student's logits.

    Args:
        temperature: T > 0, divides the logits of both sides.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def factor(self, by_temperature_squared: bool) -> float:
        """Return T^2, which keeps the size of gradients, or 1."""
        return self.temperature**2 if by_temperature_squared else 1.0

    @abstractmethod
    def begin(self, student_SBv: Tensor, teacher: Teacher) -> Statistics:
        """Compute this shard's statistics; `finish` gets them with `shard` gathered."""

    @abstractmethod
    def finish(self, stats: Statistics, gather: Gather) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss, [S, B] fp32, and numbers to save for `gradient`, [..., S, B], the student's lse first."""

    @abstractmethod
    def gradient(
        self,
        student_SBv: Tensor,
        teacher: Teacher,
        saved: tuple[Tensor, ...],
        grad_SB: Tensor,
        out_SBv: Tensor,
        lm: LMGradient | None = None,
    ) -> Tensor:
        """Write the gradient of the student's logits to `out` in its dtype, and return it.

        It is exactly 0 for tokens whose `grad` is 0, even where their logits are NaN.

        Args:
            student_SBv: [S, B, v]; with `lm` fp32, [n, v], and overwritten.
            teacher: of the same tokens.
            saved: the numbers that `finish` saved.
            grad_SB: gradient of each token's loss.
            out_SBv: the same shape as the logits.
            lm: the LM loss, whose gradient is added before the sum is rounded.
        """


@dataclass(frozen=True)
class Divergence(LogitsLoss[Tensor]):
    """Divergence from the teacher's logits, which is 0 where they agree with the student's.

    A new divergence writes `begin`, `finish` and `slope`.
    """

    kernel: ClassVar[str | None] = None  # name of the gradient's kernels; None: it is computed in torch
    needs_teacher: ClassVar[bool] = True  # the gradient reads the teacher's logits

    def __call__(self, student_SBv: Tensor, teacher_SBv: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the loss of every token, differentiable with respect to the student's logits.

        Collectives: those of `begin` and `finish`, in forward; none in backward.

        Args:
            student_SBv: [S, B, v], any float dtype.
            teacher_SBv: the same shape. Neither is changed.
            group: the ranks that share the vocabulary; None: v is all of it.

        Returns:
            [S, B] fp32, the same on every rank.
        """
        return _DivergenceFunction.apply(student_SBv, teacher_SBv, self, Gather(group))  # pyright: ignore

    def slope(self, student_nv: Tensor, teacher_nv: Tensor, saved: tuple[Tensor, ...], grad_n1: Tensor) -> Tensor:
        """Return `grad` times the derivative of the loss with respect to the student's logits, in torch.

        Args:
            student_nv: logits of some tokens, fp32, may be overwritten.
            teacher_nv: the same.
            saved: the numbers that `finish` saved, [..., n].
            grad_n1: gradient of each token's loss.
        """
        raise NotImplementedError

    def gradient(
        self,
        student_SBv: Tensor,
        teacher_SBv: Tensor,
        saved: tuple[Tensor, ...],
        grad_SB: Tensor,
        out_SBv: Tensor,
        lm: LMGradient | None = None,
    ) -> Tensor:
        """Write the gradient by the kernel or `slope`; `teacher_SBv` may be `out`. See `LogitsLoss.gradient`."""
        if self.kernel is not None:
            kernel = find_kernel(self.kernel, student_SBv, teacher_SBv, out_SBv)
            if kernel is not None:
                return kernel(student_SBv, teacher_SBv, *saved, grad_SB, out_SBv, lm, **asdict(self))
        saved_N = tuple(x.flatten(x.dim() - grad_SB.dim()) for x in saved)
        for rows, (z, t) in chunks(student_SBv, teacher_SBv):
            saved_n, grad_n1 = tuple(x[..., rows] for x in saved_N), grad_SB.flatten()[rows, None]
            write_rows(out_SBv, rows, self.slope(z, t, saved_n, grad_n1), grad_n1, student_SBv, lm)
        return out_SBv


def write_rows(
    out_SBv: Tensor, rows: slice, slope_nv: Tensor, grad_n1: Tensor, student_SBv: Tensor, lm: LMGradient | None
) -> None:
    """Write `slope` to rows of `out`, but 0 where grad is 0, even if the slope is NaN; add the LM loss's gradient."""
    slope_nv.masked_fill_(grad_n1 == 0, 0.0)
    if lm is not None:
        add_lm_gradient(student_SBv.flatten(0, -2)[rows], lm, rows, slope_nv)
    out_SBv.flatten(0, -2)[rows] = slope_nv


class _DivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_SBv: Tensor, teacher_SBv: Tensor, divergence: Divergence, gather: Gather) -> Tensor:
        stats = divergence.begin(student_SBv, teacher_SBv)
        loss_SB, saved = divergence.finish(stats._replace(shard=gather(stats.shard)), gather)
        teacher = teacher_SBv if divergence.needs_teacher else None
        ctx.save_for_backward(student_SBv, teacher, *saved)
        ctx.divergence = divergence
        return loss_SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None]:
        student_SBv, teacher_SBv, *saved = ctx.saved_tensors
        out_SBv = student_SBv.new_empty(student_SBv.shape)
        return ctx.divergence.gradient(student_SBv, teacher_SBv, tuple(saved), grad_SB, out_SBv), None, None, None

"""Parts of a fused linear loss: its inputs, the valid tokens, their logits chunk by chunk, the gradient sums.

Legend: `loss.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.divergence import LogitsLoss
from distill_nemo.losses.fused_linear import gemm
from distill_nemo.losses.fused_linear.chunk_size import chunk_size
from distill_nemo.losses.fused_linear.main_grad import GradientSum


class Side[Teacher](Protocol):
    """A teacher, of which the logits loss gets a few tokens at a time."""

    @property
    def num_buffers(self) -> int:
        """Number of buffers of logits that `part` fills, 0 or 1."""
        ...

    def frozen(self, width: int) -> Self:
        """Return it without gradients. Raise ValueError if its logits do not have `width` columns on this rank."""
        ...

    def take(self, index_M: Tensor) -> Self:
        """Return it for some tokens only."""
        ...

    def part(self, rows: slice, num_true: int, *buffer_nv: Tensor) -> Teacher:
        """Return what the loss compares the student's logits with, of some tokens."""
        ...


class Head(NamedTuple):
    """The last hidden states and their output layer. Logits are `cap(scale * (hidden @ weight.T + bias))`.

    `cap(z) = softcap * tanh(z / softcap)`, or z without a softcap.
    """

    hidden_NH: Tensor
    weight_vH: Tensor
    bias_v: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def num_buffers(self) -> int:
        """Return 1: the logits' own."""
        return 1

    def frozen(self, width: int) -> "Head":
        """Return it without gradients. Raise ValueError if its logits do not have `width` columns on this rank."""
        if self.weight_vH.shape[0] != width:
            raise ValueError(
                f"student logits would have {width} columns on this rank, teacher logits {self.weight_vH.shape[0]}"
            )
        bias_v = None if self.bias_v is None else self.bias_v.detach()
        return self._replace(hidden_NH=self.hidden_NH.detach(), weight_vH=self.weight_vH.detach(), bias_v=bias_v)

    def take(self, index_M: Tensor) -> "Head":
        """Return it for some tokens only."""
        return self._replace(hidden_NH=self.hidden_NH[index_M])

    def part(self, rows: slice, num_true: int, *buffer_nv: Tensor) -> Tensor:
        """Compute the logits of some tokens in fp32, -inf from column `num_true` on."""
        (out_nv,) = buffer_nv
        gemm.logits(self.hidden_NH[rows], self.weight_vH, self.bias_v, out_nv)
        if self.scale != 1:
            out_nv.mul_(self.scale)
        if self.softcap is not None:
            out_nv.div_(self.softcap).tanh_().mul_(self.softcap)
        out_nv[:, num_true:] = -torch.inf
        return out_nv

    def cap_slope(self, logits_nv: Tensor) -> Tensor | None:
        """Return the derivative of `cap` at the inputs of these logits, 0 in padding; None without a softcap."""
        if self.softcap is None:
            return None
        return (logits_nv / self.softcap).clamp_(-1, 1).square_().neg_().add_(1)


@dataclass(frozen=True)
class FusedLoss[Teacher]:
    """The losses to compute, and their weights.

    Args:
        divergence: the logits loss; its temperature does not apply to the LM loss, whose temperature is 1.
        factor: factor of the divergence, such as T^2 to keep the size of gradients.
        lm_weight: weight of the LM loss in the total. The host does not read a tensor. With 0.0 it has no gradient.
        logits_weight: weight of the divergence in the total.
        group: the ranks that share the vocabulary; None: v is the whole vocabulary.
        vocab_start: global index of this rank's first column.
        num_true: columns of this shard that are tokens; later ones are padding, without probability.
        upstream: the expected upstream gradient. Others work too, unless a parameter has Megatron's `main_grad`:
            its gradient is added there in forward, before the upstream gradient is known.
        chunk_tokens: n; None: chosen by the memory of a chunk's logits.
        num_valid: M, if the host knows it; else the host waits for the mask on CUDA.
    """

    divergence: LogitsLoss[Teacher]
    factor: float = 1.0
    lm_weight: float | Tensor = 0.0
    logits_weight: float | Tensor = 1.0
    group: dist.ProcessGroup | None = None
    vocab_start: int = 0
    num_true: int | None = None  # None: all
    upstream: float = 1.0
    chunk_tokens: int | None = None
    num_valid: int | None = None

    @property
    def differentiates_lm(self) -> bool:
        """True if the LM loss has a gradient."""
        return isinstance(self.lm_weight, Tensor) or self.lm_weight != 0


class ValidTokens[Teacher](NamedTuple):
    """Student and teacher of the valid tokens, their labels and masks."""

    student: Head
    teacher: Side[Teacher]
    labels_M: Tensor
    weight_M: Tensor  # of the LM loss
    kd_weight_M: Tensor  # of the logits loss
    index_M: Tensor | None  # among all tokens; None: all are valid

    @staticmethod
    def of(
        student: Head,
        teacher: Side[Teacher],
        labels_N: Tensor,
        loss_mask_N: Tensor,
        num_valid: int | None,
        has_targets_N: Tensor | None = None,
    ) -> "ValidTokens[Teacher]":
        """Select the tokens that are not masked. The teacher knows those of `has_targets` (1, else 0); None: all."""
        loss_mask_N = loss_mask_N.float()
        kd_weight_N = loss_mask_N if has_targets_N is None else loss_mask_N * has_targets_N
        valid_N = loss_mask_N > 0
        num_valid = int(valid_N.sum()) if num_valid is None else num_valid
        if num_valid == len(loss_mask_N):
            return ValidTokens(student, teacher, labels_N, loss_mask_N, kd_weight_N, None)
        index_M = valid_N.nonzero_static(size=num_valid).flatten()
        labels_M, weight_M, kd_weight_M = (x_N[index_M] for x_N in (labels_N, loss_mask_N, kd_weight_N))
        return ValidTokens(student.take(index_M), teacher.take(index_M), labels_M, weight_M, kd_weight_M, index_M)


class Gradients(NamedTuple):
    """Sums of gradients that forward computes; None for those that are not needed."""

    hidden_MH: Tensor | None
    weight: GradientSum | None
    bias: GradientSum | None

    @staticmethod
    def of[T](student: Head, wanted: Any, valid: ValidTokens[T]) -> "Gradients":
        """Start from zeros, or from Megatron's sums so far."""
        hidden_MH = valid.student.hidden_NH.new_empty(valid.student.hidden_NH.shape, dtype=torch.float32)
        pairs = zip((student.weight_vH, student.bias_v), wanted[1:], strict=True)
        parameters = (GradientSum(x) if x is not None and needed else None for x, needed in pairs)
        return Gradients(hidden_MH if wanted[0] else None, *parameters)

    def add[T](self, valid: ValidTokens[T], rows: slice, grad_nv: Tensor) -> None:
        """Add the gradients that follow from the gradient of some tokens' logits."""
        if self.hidden_MH is not None:
            gemm.hidden_gradient(grad_nv, valid.student.weight_vH, self.hidden_MH[rows])
        if self.weight is not None:
            gemm.add_weight_gradient(grad_nv, valid.student.hidden_NH[rows], self.weight.sum)
        if self.bias is not None:
            self.bias.sum.add_(grad_nv.sum(0, dtype=torch.float32))


class TokenLogits[Teacher](NamedTuple):
    """Some tokens, while their logits exist."""

    rows: slice
    student_nv: Tensor  # fp32, padding holds -inf; may be overwritten
    teacher: Teacher  # likewise
    spare_nv: Tensor  # memory for the gradient: the teacher's logits, or the student's if there are none


def chunk_logits[Teacher](
    valid: ValidTokens[Teacher], loss: FusedLoss[Teacher], num_buffers: int = 1
) -> Iterator[TokenLogits[Teacher]]:
    """Yield successive tokens with their logits, which are valid until `num_buffers` more have been taken."""
    num_tokens, width = len(valid.labels_M), valid.student.weight_vH.shape[0]
    if num_tokens == 0:
        return
    num_true = width if loss.num_true is None else loss.num_true
    size = chunk_size(num_tokens, width, valid.labels_M.is_cuda, loss.chunk_tokens)
    num_chunks = -(-num_tokens // size)
    shape = 1 + valid.teacher.num_buffers, size, width
    buffers = [valid.weight_M.new_empty(shape, dtype=torch.float32) for _ in range(min(num_buffers, num_chunks))]
    for number, start in enumerate(range(0, num_tokens, size)):
        rows = slice(start, min(start + size, num_tokens))
        outs = buffers[number % len(buffers)][:, : rows.stop - start]
        student_nv = valid.student.part(rows, num_true, outs[0])
        yield TokenLogits(rows, student_nv, valid.teacher.part(rows, num_true, *outs[1:]), outs[-1])

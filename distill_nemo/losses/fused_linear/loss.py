"""Losses and gradients from hidden states and output weights; logits exist for a few tokens at a time.

Legend: N tokens, M valid ones, n a chunk of them, H width (student and teacher may differ), v this rank's
vocabulary shard. In torch, with `z, t = student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T` (and
biases, scales and softcaps, see `Head`), labels, mask, and the logits loss of `losses/logits.py` (with stored targets,
that of their codec in `losses/stored`):

    lm = (F.cross_entropy(z, labels, reduction="none") * mask).sum()
    kd = (LogitsKLLoss(...)(z, t) * mask).sum()
    lm_weight * lm + logits_weight * kd

Forward computes the gradient chunk by chunk, from logits that it then discards. So the weights of the losses must be
known by then, and only the weighted sum can be differentiated. Backward multiplies by its upstream gradient. A chunk's
all-gather (two with Jensen-Shannon) overlaps the next chunk's logits. Collectives of the hidden states are up to the
caller: their gradient is this rank's share of a sum over ranks.

Related: Apple's Cut Cross-Entropy (arXiv:2411.09009) recomputes logits in backward, for one more product. Liger's
fused linear losses (arXiv:2410.10989) compute gradients in forward, as here.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses.collectives import Gather, merge
from distill_nemo.losses.cross_entropy import cross_entropy, label_logits, lm_gradient, local_lse
from distill_nemo.losses.divergence import Statistics
from distill_nemo.losses.fused_linear import gemm
from distill_nemo.losses.fused_linear.chunks import (
    FusedLoss,
    Gradients,
    Head,
    Side,
    TokenLogits,
    ValidTokens,
    chunk_logits,
)


class Losses(NamedTuple):
    """Sums over the valid tokens, fp32 scalars, the same on every rank."""

    total: Tensor  # differentiable
    lm: Tensor
    logits: Tensor  # factor included


def fused_linear_losses[Teacher](
    student: Head,
    teacher: Side[Teacher],
    labels_N: Tensor,
    loss_mask_N: Tensor,
    loss: FusedLoss[Teacher],
    has_targets_N: Tensor | None = None,
) -> Losses:
    """Compute the losses of tokens with a positive mask, each times its mask. No product includes masked tokens.

    The gradient of `total` goes to the student's hidden states (under tensor parallelism this rank's share of a sum),
    weight and bias. The teacher gets none. Gradients are summed in fp32, in `main_grad` if a parameter has one.

    Args:
        student: the student's hidden states and output layer.
        teacher: those of the teacher, or stored targets.
        labels_N: ids of the tokens that follow.
        loss_mask_N: weight of each token.
        loss: the losses, of the teacher's kind.
        has_targets_N: 0 where a token has no logits loss, for want of a teacher, else 1; None: every token has one.

    Raises:
        ValueError: if the shards' widths differ.
        RuntimeError: in backward, see `FusedLoss.upstream`.
    """
    teacher = teacher.frozen(student.weight_vH.shape[0])
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student[:3])
    tokens = labels_N, loss_mask_N, has_targets_N
    return Losses(*_FusedLinear.apply(*student, teacher, *tokens, loss, differentiate))  # pyright: ignore


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        scale: float,
        softcap: float | None,
        teacher: Side[Any],
        labels_N: Tensor,
        loss_mask_N: Tensor,
        has_targets_N: Tensor | None,
        loss: FusedLoss[Any],
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(hidden_NH, weight_vH, bias_v, scale, softcap)
        valid = ValidTokens.of(student, teacher, labels_N, loss_mask_N, loss.num_valid, has_targets_N)
        sums = Gradients.of(student, ctx.needs_input_grad[:3], valid) if differentiate else None
        lm_M, kd_M = _all_chunks(valid, loss, sums)
        lm, kd = (lm_M * valid.weight_M).sum(), (kd_M * valid.kd_weight_M).sum()
        ctx.sums, ctx.where, ctx.shape, ctx.upstream = sums, valid.index_M, hidden_NH.shape, loss.upstream
        ctx.dtype = hidden_NH.dtype
        ctx.mark_non_differentiable(lm, kd)
        return loss.lm_weight * lm + loss.logits_weight * kd, lm, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scale, sums = grad / ctx.upstream, ctx.sums
        hidden_NH = None
        if sums.hidden_MH is not None:
            hidden_MH = (sums.hidden_MH * scale).to(ctx.dtype)
            hidden_NH = hidden_MH
            if ctx.where is not None:
                hidden_NH = hidden_MH.new_zeros(ctx.shape).index_copy_(0, ctx.where, hidden_MH)
        parameters = (None if x is None else x.finish(scale) for x in (sums.weight, sums.bias))
        return hidden_NH, *parameters, *[None] * 8


class _Chunk[Teacher](NamedTuple):
    """Some tokens, while the statistics of their logits are gathered."""

    part: TokenLogits[Teacher]
    own: tuple[Tensor, ...]  # of the logits loss's statistics
    wait: Callable[[], list[Tensor]]


def _all_chunks[T](valid: ValidTokens[T], loss: FusedLoss[T], sums: Gradients | None) -> tuple[Tensor, Tensor]:
    """Return LM loss and logits loss of every valid token, [M] fp32 each, and add their gradients to `sums`."""
    lm_M, kd_M = torch.empty(2, len(valid.labels_M), dtype=torch.float32, device=valid.labels_M.device)
    num_in_flight = 1 if Gather(loss.group).num_ranks == 1 else 2
    begun: deque[_Chunk[T]] = deque()
    for part in chunk_logits(valid, loss, num_in_flight):
        begun.append(_begin(valid, loss, part))
        if len(begun) == num_in_flight:
            chunk = begun.popleft()
            lm_M[chunk.part.rows], kd_M[chunk.part.rows] = _finish(valid, loss, sums, chunk)
    for chunk in begun:
        lm_M[chunk.part.rows], kd_M[chunk.part.rows] = _finish(valid, loss, sums, chunk)
    return lm_M, kd_M


def _begin[T](valid: ValidTokens[T], loss: FusedLoss[T], part: TokenLogits[T]) -> _Chunk[T]:
    """Compute this rank's statistics and start to gather them."""
    stats = loss.divergence.begin(part.student_nv, part.teacher)
    parts = [stats.shard, label_logits(part.student_nv, valid.labels_M[part.rows], loss.vocab_start)]
    if loss.divergence.temperature != 1:
        parts.append(local_lse(part.student_nv))
    return _Chunk(part, stats.own, Gather(loss.group).start(parts))


def _finish[T](
    valid: ValidTokens[T], loss: FusedLoss[T], sums: Gradients | None, chunk: _Chunk[T]
) -> tuple[Tensor, Tensor]:
    """Return the losses of the chunk's tokens, `factor` included, and add their gradients to `sums`."""
    shards, label_Rn, *lse_R2n = chunk.wait()
    kd_n, saved = loss.divergence.finish(Statistics(shards, chunk.own), Gather(loss.group))
    lse_2n = merge(lse_R2n[0], 1.0)[0] if lse_R2n else saved[0]
    if sums is not None:
        sums.add(valid, chunk.part.rows, _logits_gradient(valid, loss, chunk.part, saved, lse_2n))
    return cross_entropy(lse_2n, label_Rn), kd_n * loss.factor


def _logits_gradient[T](
    valid: ValidTokens[T], loss: FusedLoss[T], part: TokenLogits[T], saved: tuple[Tensor, ...], lse_2n: Tensor
) -> Tensor:
    """Return the gradient of the student's `hidden @ weight.T + bias`, in the spare memory if dtypes agree.

    Only the derivative of a softcap needs more memory.
    """
    z_nv, student, lm, scale = part.student_nv, valid.student, None, loss.upstream * valid.student.scale
    slope_nv = student.cap_slope(z_nv)  # before the logits' memory is overwritten
    if loss.differentiates_lm:
        labels_n, grad_n = valid.labels_M[part.rows], valid.weight_M[part.rows] * scale * loss.lm_weight
        lm = lm_gradient(labels_n, loss.vocab_start, z_nv.shape[-1], lse_2n, grad_n)
    dtype = gemm.gradient_dtype(student.weight_vH) if slope_nv is None else torch.float32
    out_nv = part.spare_nv if dtype == part.spare_nv.dtype else torch.empty_like(z_nv, dtype=dtype)
    grad_n = valid.kd_weight_M[part.rows] * scale * (loss.factor * loss.logits_weight)
    out_nv = loss.divergence.gradient(z_nv, part.teacher, saved, grad_n, out_nv, lm)
    return out_nv if slope_nv is None else out_nv.mul_(slope_nv)

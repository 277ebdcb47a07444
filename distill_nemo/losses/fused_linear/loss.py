"""Losses and gradients from hidden states and output weights; logits exist for a few tokens at a time.

Legend: N tokens, M valid ones, n a chunk of them, H width (student and teacher may differ), v this rank's
vocabulary shard. In torch, with `z, t = student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T` (and
biases, scales and softcaps, see `Head`), labels, mask, and the logits loss of `losses/logits.py`:

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
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Gradients, Head, ValidTokens, chunk_logits


class Losses(NamedTuple):
    """Sums over the valid tokens, fp32 scalars, the same on every rank."""

    total: Tensor  # differentiable
    lm: Tensor
    logits: Tensor  # factor included


def fused_linear_losses(student: Head, teacher: Head, labels_N: Tensor, loss_mask_N: Tensor, loss: FusedLoss) -> Losses:
    """Compute the losses of tokens with a positive mask, each times its mask. No product includes masked tokens.

    The gradient of `total` goes to the student's hidden states (under tensor parallelism this rank's share of a sum),
    weight and bias. The teacher gets none. Gradients are summed in fp32, in `main_grad` if a parameter has one.

    Raises:
        ValueError: if the shards' widths differ.
        RuntimeError: in backward, see `FusedLoss.upstream`.
    """
    widths = student.weight_vH.shape[0], teacher.weight_vH.shape[0]
    if widths[0] != widths[1]:
        raise ValueError(f"student logits would have {widths[0]} columns on this rank, teacher logits {widths[1]}")
    bias_v = None if teacher.bias_v is None else teacher.bias_v.detach()
    frozen = {"hidden_NH": teacher.hidden_NH.detach(), "weight_vH": teacher.weight_vH.detach(), "bias_v": bias_v}
    teacher = teacher._replace(**frozen)
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student[:3])
    return Losses(*_FusedLinear.apply(*student, teacher, labels_N, loss_mask_N, loss, differentiate))  # pyright: ignore


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        scale: float,
        softcap: float | None,
        teacher: Head,
        labels_N: Tensor,
        loss_mask_N: Tensor,
        loss: FusedLoss,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(hidden_NH, weight_vH, bias_v, scale, softcap)
        valid = ValidTokens.of(student, teacher, labels_N, loss_mask_N, loss.num_valid)
        sums = Gradients.of(student, ctx.needs_input_grad[:3], valid) if differentiate else None
        lm_M, kd_M = _all_chunks(valid, loss, sums)
        lm, kd = ((x_M * valid.weight_M).sum() for x_M in (lm_M, kd_M))
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
        return hidden_NH, *parameters, *[None] * 7


class _Chunk(NamedTuple):
    """Some tokens, while the statistics of their logits are gathered."""

    rows: slice
    student_nv: Tensor
    teacher_nv: Tensor
    own: tuple[Tensor, ...]  # of the divergence's statistics
    wait: Callable[[], list[Tensor]]


def _all_chunks(valid: ValidTokens, loss: FusedLoss, sums: Gradients | None) -> tuple[Tensor, Tensor]:
    """Return LM loss and logits loss of every valid token, [M] fp32 each, and add their gradients to `sums`."""
    lm_M, kd_M = torch.empty(2, len(valid.labels_M), dtype=torch.float32, device=valid.labels_M.device)
    num_in_flight = 1 if Gather(loss.group).num_ranks == 1 else 2
    begun: deque[_Chunk] = deque()
    for rows, z_nv, t_nv in chunk_logits(valid, loss, num_in_flight):
        begun.append(_begin(valid, loss, rows, z_nv, t_nv))
        if len(begun) == num_in_flight:
            chunk = begun.popleft()
            lm_M[chunk.rows], kd_M[chunk.rows] = _finish(valid, loss, sums, chunk)
    for chunk in begun:
        lm_M[chunk.rows], kd_M[chunk.rows] = _finish(valid, loss, sums, chunk)
    return lm_M, kd_M


def _begin(valid: ValidTokens, loss: FusedLoss, rows: slice, z_nv: Tensor, t_nv: Tensor) -> _Chunk:
    """Compute this rank's statistics and start to gather them."""
    stats = loss.divergence.begin(z_nv, t_nv)
    parts = [stats.shard, label_logits(z_nv, valid.labels_M[rows], loss.vocab_start)]
    if loss.divergence.temperature != 1:
        parts.append(local_lse(z_nv))
    return _Chunk(rows, z_nv, t_nv, stats.own, Gather(loss.group).start(parts))


def _finish(valid: ValidTokens, loss: FusedLoss, sums: Gradients | None, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Return the losses of the chunk's tokens, `factor` included, and add their gradients to `sums`."""
    shards, label_Rn, *lse_R2n = chunk.wait()
    kd_n, saved = loss.divergence.finish(Statistics(shards, chunk.own), Gather(loss.group))
    lse_2n = merge(lse_R2n[0], 1.0)[0] if lse_R2n else saved[0]
    if sums is not None:
        sums.add(valid, chunk.rows, _logits_gradient(valid, loss, chunk, saved, lse_2n))
    return cross_entropy(lse_2n, label_Rn), kd_n * loss.factor


def _logits_gradient(
    valid: ValidTokens, loss: FusedLoss, chunk: _Chunk, saved: tuple[Tensor, ...], lse_2n: Tensor
) -> Tensor:
    """Return the gradient of the student's `hidden @ weight.T + bias`, in the teacher's logits' memory if dtypes agree.

    Only the derivative of a softcap needs more memory.
    """
    z_nv, t_nv, student, lm = chunk.student_nv, chunk.teacher_nv, valid.student, None
    weight_n = valid.weight_M[chunk.rows] * (loss.upstream * student.scale)
    slope_nv = student.cap_slope(z_nv)  # before the divergence takes the logits' memory
    if loss.differentiates_lm:
        labels_n, grad_n = valid.labels_M[chunk.rows], weight_n * loss.lm_weight
        lm = lm_gradient(labels_n, loss.vocab_start, z_nv.shape[-1], lse_2n, grad_n)
    dtype = gemm.gradient_dtype(student.weight_vH) if slope_nv is None else torch.float32
    out_nv = t_nv if dtype == t_nv.dtype else torch.empty_like(t_nv, dtype=dtype)
    grad_n = weight_n * (loss.factor * loss.logits_weight)
    out_nv = loss.divergence.gradient(z_nv, t_nv, saved, grad_n, out_nv, lm)
    return out_nv if slope_nv is None else out_nv.mul_(slope_nv)

"""From hidden states and output weights to the losses and their gradients; logits exist for a few tokens at a time.

Legend: N tokens, M those that count, n a chunk of them, H width (student and teacher may differ), v this rank's
vocabulary shard. In torch, with `z, t = student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T` (and
biases), labels, mask, and the logits loss of `logits.py`:

    lm = (F.cross_entropy(z, labels, reduction="none") * mask).sum()
    kd = (LogitsKLLoss(...)(z, t) * mask).sum()
    lm_weight * lm + logits_weight * kd

The gradient is computed in forward, chunk by chunk, from logits that are then forgotten. So the weights of the losses
must be known there, and only their weighted sum can be differentiated; backward multiplies by its upstream gradient.
A chunk's all-gather (one, with Jensen-Shannon two) is under way while the next chunk's logits are computed; the others
are hidden states' and up to the caller: the gradient of the hidden states is this rank's share of a sum over ranks.

Ideas: Apple's Cut Cross-Entropy (arXiv:2411.09009) recomputes logits in backward, one product more; Liger's fused
linear losses (arXiv:2410.10989) compute gradients in forward, as here.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses import gemm
from distill_nemo.losses.cross_entropy import CrossEntropy, cross_entropy, label_logits, local_lse
from distill_nemo.losses.fused_chunks import CountedTokens, FusedLoss, Gradients, Head, chunk_logits
from distill_nemo.losses.vocab_parallel import gather, merge, start_gather


class Losses(NamedTuple):
    """Sums over the tokens that count, fp32 scalars, the same on every rank."""

    total: Tensor  # differentiable
    lm: Tensor
    logits: Tensor  # factor included


def fused_linear_losses(student: Head, teacher: Head, labels_N: Tensor, loss_mask_N: Tensor, loss: FusedLoss) -> Losses:
    """The losses of tokens with a positive mask, each times its mask; the others are not even multiplied.

    The gradient of `total` goes to the student's hidden states (under tensor parallelism this rank's share of a sum),
    weight and bias, none to the teacher. It is added up in fp32, in `main_grad` where a parameter has it.

    Raises:
        ValueError: when the shards' widths differ.
        RuntimeError: in backward, see `FusedLoss.upstream`.
    """
    widths = student.weight_vH.shape[0], teacher.weight_vH.shape[0]
    if widths[0] != widths[1]:
        raise ValueError(f"student logits would have {widths[0]} columns on this rank, teacher logits {widths[1]}")
    bias_v = None if teacher.bias_v is None else teacher.bias_v.detach()
    teacher = Head(teacher.hidden_NH.detach(), teacher.weight_vH.detach(), bias_v)
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    return Losses(*_FusedLinear.apply(*student, teacher, labels_N, loss_mask_N, loss, differentiate))  # pyright: ignore


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        teacher: Head,
        labels_N: Tensor,
        loss_mask_N: Tensor,
        loss: FusedLoss,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(hidden_NH, weight_vH, bias_v)
        counted = CountedTokens.of(student, teacher, labels_N, loss_mask_N, loss.num_counted)
        sums = Gradients.of(student, ctx.needs_input_grad[:3], counted) if differentiate else None
        lm_M, kd_M = _all_chunks(counted, loss, sums)
        lm, kd = ((x_M * counted.weight_M).sum() for x_M in (lm_M, kd_M))
        ctx.sums, ctx.where, ctx.shape, ctx.upstream = sums, counted.index_M, hidden_NH.shape, loss.upstream
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
        return hidden_NH, *parameters, None, None, None, None, None


def _all_chunks(counted: CountedTokens, loss: FusedLoss, sums: Gradients | None) -> tuple[Tensor, Tensor]:
    """LM loss and logits loss of every counted token, [M] fp32 each; gradients are added to `sums`."""
    lm_M, kd_M = torch.empty(2, len(counted.labels_M), dtype=torch.float32, device=counted.labels_M.device)
    alone = loss.group is None or dist.get_world_size(loss.group) == 1
    before: list[tuple[slice, Generator[None, None, tuple[Tensor, Tensor]]]] = []
    for rows, z_nv, t_nv in chunk_logits(counted, loss, 1 if alone else 2):
        chunk = _chunk(counted, loss, sums, rows, z_nv, t_nv)
        next(chunk)  # its collective is under way
        before.append((rows, chunk))
        if alone or len(before) == 2:
            _finish(*before.pop(0), lm_M, kd_M)
    for rows, chunk in before:
        _finish(rows, chunk, lm_M, kd_M)
    return lm_M, kd_M


def _finish(rows: slice, chunk: Generator[None, None, tuple[Tensor, Tensor]], lm_M: Tensor, kd_M: Tensor) -> None:
    try:
        next(chunk)
    except StopIteration as end:
        lm_M[rows], kd_M[rows] = end.value


def _chunk(
    counted: CountedTokens, loss: FusedLoss, sums: Gradients | None, rows: slice, z_nv: Tensor, t_nv: Tensor
) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Losses of the chunk's tokens, `factor` included; stops once, when its first collective has begun."""
    labels_n, temperature = counted.labels_M[rows], loss.temperature
    lm_stats = [label_logits(z_nv, labels_n, loss.vocab_start)]
    if temperature != 1:
        lm_stats.append(local_lse(z_nv))
    steps = loss.divergence.steps(z_nv, t_nv, temperature)
    wait = start_gather([next(steps), *lm_stats], loss.group)
    yield
    gathered, label_Rn, *lse_R2n = wait()
    while True:
        try:
            gathered = gather(steps.send(gathered), loss.group)
        except StopIteration as end:
            kd_n, numbers = end.value
            break
    lse_2n = merge(lse_R2n[0], 1.0)[0] if lse_R2n else numbers[0]
    if sums is not None:
        weight_n = counted.weight_M[rows] * loss.upstream
        grad_n, lm = weight_n * (loss.factor * loss.logits_weight), None
        if loss.lm_counts:
            lm = CrossEntropy.of(labels_n, loss.vocab_start, z_nv.shape[-1], lse_2n, weight_n * loss.lm_weight)
        dtype = gemm.gradient_dtype(counted.student.weight_vH)
        sums.add(counted, rows, loss.divergence.gradient(z_nv, t_nv, numbers, grad_n, temperature, lm, dtype))
    return cross_entropy(lse_2n, label_Rn), kd_n * loss.factor

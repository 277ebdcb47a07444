"""Compute a rank's part of a loss in plain torch: parts that the divergences share, and the reference for the kernels.

Legend: S sequence, B batch, v this rank's vocabulary shard, N = S B tokens, n some of them. Logits are of any float
dtype, numbers per token fp32. No collectives.

A log-sum-exp of logits x is two numbers, `lse_2SB`: the peak, which is their largest, and the total, sum exp((x - peak)
/ T). So softmax(x / T) = exp((x - peak) / T) / total. In one fp32 number, `peak / T + log(total)`, an offset common to
all logits would take digits of the total. So the peak is subtracted first, and the rest is divided by T.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements worked on at once. On CPU a few such fp32 buffers stay in a core's cache; on CUDA fewer launches win.
CHUNK = 2**17
CUDA_CHUNK = 2**22


def chunks(*logits_SBv: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield successive tokens and fp32 copies [n, v] of their logits, which may be overwritten.

    The copies are valid until the next ones are taken.
    """
    logits_Nv = [x.flatten(0, -2) for x in logits_SBv]
    num_tokens, width = logits_Nv[0].shape
    step = max(1, (CUDA_CHUNK if logits_Nv[0].is_cuda else CHUNK) // max(1, width))
    buffers = [x.new_empty(min(step, num_tokens), width, dtype=torch.float32) for x in logits_Nv]
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        pairs = zip(buffers, logits_Nv, strict=True)
        yield rows, tuple(buffer[: rows.stop - start].copy_(x[rows]) for buffer, x in pairs)


def below(logits_nv: Tensor, peak_n: Tensor, temperature: float) -> Tensor:
    """Compute `(logits - peak) / T` in place."""
    # A shard of nothing but -inf would give -inf - -inf; its weights are 0 whatever is subtracted.
    logits_nv.sub_(peak_n.masked_fill(peak_n == -torch.inf, 0.0)[..., None])
    return logits_nv if temperature == 1 else logits_nv.div_(temperature)


def softmax(logits_nv: Tensor, lse_2n: Tensor, temperature: float) -> Tensor:
    """Compute `softmax(logits / T)` in place."""
    peak_n, total_n = lse_2n
    return below(logits_nv, peak_n, temperature).exp_().div_(total_n[:, None])


def total_and_mean(below_nv: Tensor, values_nv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the weights `exp(below)`, and the mean of `values` under them. Weight 0 has no effect."""
    weights = below_nv.exp()
    total = weights.sum(-1)
    return total, weigh(weights, values_nv).sum(-1) / total.clamp(min=1.0)  # 0 in a shard of nothing but -inf


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """Return `weights * values`, and 0 where the weight is 0: in padding the value is inf - inf, so NaN."""
    return torch.where(weights == 0, 0.0, weights * values)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """Return `(x_peak, x_total, y_peak, y_total, mean)` of the shard's logits x and y: [5, S, B].

    mean is the mean under softmax(x / T) of `(x - x_peak) / T - (y - y_peak) / T`.
    """
    stats = []
    for _, (x, y) in chunks(p_logits_SBv, q_logits_SBv):
        x_peak, y_peak = x.amax(-1), y.amax(-1)
        x, y = below(x, x_peak, temperature), below(y, y_peak, temperature)
        y_total = y.exp().sum(-1)
        x_total, mean = total_and_mean(x, torch.sub(x, y, out=y))
        stats.append(torch.stack([x_peak, x_total, y_peak, y_total, mean]))
    return torch.cat(stats, dim=1).unflatten(1, p_logits_SBv.shape[:-1])


class LMGradient(NamedTuple):
    """The gradient of the LM loss of some tokens, `grad (softmax(logits) - [j = label])`, without their logits."""

    column_n: Tensor  # column of the label in this shard; -1 if it is in another
    lse_2n: Tensor  # over the whole vocabulary, at temperature 1
    grad_n: Tensor  # of each token's loss


def add_lm_gradient(logits_nv: Tensor, lm: LMGradient, rows: slice, out_nv: Tensor) -> None:
    """Add the gradient of these rows to `out`. Both are fp32; the logits are overwritten."""
    grad_n, column_n = lm.grad_n[rows], lm.column_n[rows]
    out_nv.add_(softmax(logits_nv, lm.lse_2n[:, rows], 1.0).mul_(grad_n[:, None]))
    at_label_n = torch.where(column_n < 0, 0.0, -grad_n)
    out_nv.scatter_add_(-1, column_n.clamp(min=0)[:, None], at_label_n[:, None])


def softmax_gradient(
    logits_nv: Tensor,
    temperature: float,
    peak_n: Tensor,
    scale_n: Tensor,
    second: tuple[Tensor, Tensor] | None,
    column_nK: Tensor,
    value_nK: Tensor,
    out_nv: Tensor,
) -> Tensor:
    """Write `scale exp((logits - peak) / T)`, and add `value` at `column`. Return `out`, which may be `logits`.

    Args:
        logits_nv: of some tokens.
        temperature: T.
        peak_n: anything that keeps the exponentials finite.
        scale_n: factor of each token; 0 gives 0, even where logits are NaN.
        second: peak and scale of a second such term, at temperature 1; None: there is none.
        column_nK: columns in which something is added; several may be the same.
        value_nK: fp32 numbers to add.
        out_nv: the result, rounded to its dtype once.
    """
    terms = [(peak_n, scale_n, temperature)] + ([] if second is None else [(*second, 1.0)])
    for rows, copies in chunks(*[logits_nv] * len(terms)):
        total_nv, *others = (
            below(x, peak[rows], t).exp_().mul_(scale[rows, None]).masked_fill_(scale[rows, None] == 0, 0.0)
            for x, (peak, scale, t) in zip(copies, terms, strict=True)
        )
        for other_nv in others:
            total_nv.add_(other_nv)
        out_nv[rows] = total_nv.scatter_add_(-1, column_nK[rows], value_nK[rows])
    return out_nv

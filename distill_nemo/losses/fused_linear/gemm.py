"""Multiply with an output layer, with fp32 results for every dtype of its weight.

Rounding logits to bf16 before the softmax would be the largest error of a loss. On CUDA, low-precision factors are
multiplied directly and the fp32 accumulator is kept. On CPU torch has no such product, so the weight is converted to
fp32 in blocks, in a buffer that stays in the cache.

Legend: n some tokens, H width of a model, v this rank's vocabulary shard.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20


def logits(hidden_nH: Tensor, weight_vH: Tensor, bias_v: Tensor | None, out_nv: Tensor) -> Tensor:
    """Compute `out = hidden @ weight.T + bias` in fp32."""
    if _keeps_accumulator(hidden_nH, weight_vH):
        torch.mm(hidden_nH, weight_vH.t(), out_dtype=torch.float32, out=out_nv)
    else:
        hidden_nH = hidden_nH.float()
        for columns, block in _blocks(weight_vH):
            torch.mm(hidden_nH, block.t(), out=out_nv[:, columns])
    return out_nv if bias_v is None else out_nv.add_(bias_v)


def gradient_dtype(weight_vH: Tensor) -> torch.dtype:
    """Return the dtype in which the gradient of the logits is multiplied."""
    return weight_vH.dtype if _low_precision_cuda(weight_vH) else torch.float32


def hidden_gradient(grad_nv: Tensor, weight_vH: Tensor, out_nH: Tensor) -> None:
    """Compute `out = grad @ weight` in fp32."""
    if _low_precision_cuda(weight_vH):
        torch.mm(grad_nv.to(weight_vH.dtype), weight_vH, out_dtype=torch.float32, out=out_nH)
        return
    out_nH.zero_()
    for columns, block in _blocks(weight_vH):
        out_nH.addmm_(grad_nv[:, columns], block)


def add_weight_gradient(grad_nv: Tensor, hidden_nH: Tensor, sum_vH: Tensor) -> None:
    """Compute `sum += grad.T @ hidden` in fp32."""
    if _low_precision_cuda(hidden_nH):
        grad_vn = grad_nv.to(hidden_nH.dtype).t()
        torch.addmm(sum_vH, grad_vn, hidden_nH, out_dtype=torch.float32, out=sum_vH)
    else:
        sum_vH.addmm_(grad_nv.float().t(), hidden_nH.float())


def _low_precision_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _keeps_accumulator(hidden_nH: Tensor, weight_vH: Tensor) -> bool:
    return _low_precision_cuda(weight_vH) and hidden_nH.dtype == weight_vH.dtype


def _blocks(weight_vH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and those rows of the weight in fp32, valid until the next ones are taken."""
    num_rows, width = weight_vH.shape
    if weight_vH.dtype == torch.float32:
        yield slice(0, num_rows), weight_vH
        return
    step = max(1, BLOCK_BYTES // (4 * width))
    buffer = weight_vH.new_empty(min(step, num_rows), width, dtype=torch.float32)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        yield rows, buffer[: rows.stop - start].copy_(weight_vH[rows])

"""NVFP4 on a CPU, for which ModelOpt has no kernel: its backend for quantizers there."""

from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from distill_nemo.quantization import NVFP4

LARGEST, LARGEST_SCALE = 6.0, 448.0  # of E2M1 and of E4M3
SMALLEST_SCALE = 1e-5  # ModelOpt's kernel makes zeros of a block whose scale is below


def simulate(x: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Round to NVFP4, bit for bit as ModelOpt's Triton kernel `fp4_fake_quant_block`. The gradient passes unchanged.

    ```
    tensor_scale = amax / (6 * 448)
    scale = e4m3(min(block.abs().amax() / (6 * tensor_scale), 448)) * tensor_scale  # of 16 values along the last axis
    y = e2m1(x / scale) * scale
    ```

    Both round to nearest, ties to even.

    Args:
        x: values; 16 divides the last dimension.
        quantizer: has the amax of the tensor, beyond which values are clipped.
    """
    assert quantizer.amax is not None, "a static amax"
    rounded = _PassThrough.apply(x, quantizer.amax)
    assert isinstance(rounded, Tensor)
    return rounded


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor) -> Tensor:
        return _rounded(x, amax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _rounded(x: Tensor, amax: Tensor) -> Tensor:
    tensor_scale = amax.float() / (LARGEST * LARGEST_SCALE)
    tensor_scale = tensor_scale.where(tensor_scale > 0, 1e-12)
    blocks = x.float().unflatten(-1, (-1, NVFP4.block or 0))
    scale = blocks.abs().amax(-1, keepdim=True) / (LARGEST * tensor_scale)
    scale = scale.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float() * tensor_scale
    scale = scale.where(scale >= SMALLEST_SCALE, 1.0)
    scaled = blocks.abs() / scale
    step = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))  # between neighbours in E2M1
    magnitudes = (scaled / step).round_().mul_(step).clamp_(max=LARGEST).mul_(scale)
    return magnitudes.where(blocks >= 0, -magnitudes).flatten(-2).to(x.dtype)

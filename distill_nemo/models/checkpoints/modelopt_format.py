"""Pack weights as ModelOpt's unified Hugging Face format stores them, and unpack them.

A weight [out, in] becomes codes and scales, and its value is code * scale: `weight` and `weight_scale` in its module.

| | weight | weight_scale | |
| --- | --- | --- | --- |
| FP8 | E4M3 [out, in] | fp32 [] | or [out]: one a row |
| NVFP4 | two E2M1 a byte, uint8 [out, in / 2] | E4M3 [out, in / 16] | times weight_scale_2, fp32 [] |
| INT8 | int8 [out, in] | fp32 [out] | |
| INT4 | two rows a byte, uint8 [out / 2, in] | fp32 [out, in / group] | |

The lower half of a byte is the column, or the row, that comes first. Source: `modelopt/torch/export/quant_utils.py` of
ModelOpt 0.47.
"""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["fp8", "nvfp4", "int8", "int4"]

WEIGHT, SCALE, SCALE_2, INPUT_SCALE = "weight", "weight_scale", "weight_scale_2", "input_scale"  # within a module
CACHE_SCALES = ("k_proj.k_scale", "v_proj.v_scale")  # within an attention layer
NVFP4_BLOCK = 16  # columns that share a scale
SMALLEST_BLOCK_SCALE = 2.0**-9  # of E4M3; a block of zeros has it, too
PER_BYTE: dict[Layout, tuple[int, int]] = {"fp8": (1, 1), "nvfp4": (1, 2), "int8": (1, 1), "int4": (2, 1)}  # [out, in]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack(stored: Tensor, layout: Layout) -> Tensor:
    """Return the fp32 values [out, in] that the stored codes stand for, without their scales."""
    if layout in ("fp8", "int8"):
        return stored.float()
    low, high = stored & 0xF, stored >> 4
    if layout == "nvfp4":
        return e2m1_values(torch.stack([low, high], dim=-1).flatten(-2))
    codes = torch.stack([low, high], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes).float()


def e2m1_values(codes: Tensor) -> Tensor:
    """Return the values of E2M1 codes of 4 bits, in fp32."""
    return torch.tensor(E2M1, device=codes.device)[codes.int()]


def pack(values: Tensor, layout: Layout) -> Tensor:
    """Store values [out, in], already divided by their scales: each becomes the nearest that the layout has."""
    if layout == "fp8":
        return values.clamp(-448, 448).to(torch.float8_e4m3fn)
    if layout == "int8":
        return values.round().clamp(-128, 127).to(torch.int8)
    if layout == "nvfp4":
        codes = e2m1_codes(values)
        return codes[:, 0::2] | codes[:, 1::2] << 4
    codes = values.round().clamp(-8, 7).to(torch.int8).view(torch.uint8) & 0xF
    return codes[0::2] | codes[1::2] << 4


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the codes of the E2M1 values nearest to `values`, a tie to the even code, in uint8."""
    positive = torch.tensor(E2M1[:8], device=values.device)
    size = values.abs().contiguous()
    middles = (positive[1:] + positive[:-1]) / 2
    down, up = (
        torch.bucketize(size, middles, right=right) for right in (False, True)
    )  # of a tie: the lower, the upper
    codes = torch.where(down % 2 == 0, down, up)
    return (codes + 8 * values.signbit()).to(torch.uint8)

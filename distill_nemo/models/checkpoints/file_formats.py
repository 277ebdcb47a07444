"""Formats of quantised weights in Hugging Face files: codes and scales that stand for a matrix [out, in] of a module.

ModelOpt's unified format:

| | weight | weight_scale | |
| --- | --- | --- | --- |
| FP8 | E4M3 [out, in] | fp32 [] | or [out]: one a row |
| NVFP4 | two E2M1 a byte, uint8 [out, in / 2] | E4M3 [out, in / 16] | times weight_scale_2, fp32 [] |
| INT8 | int8 [out, in] | fp32 [out] | |
| INT4 | two rows a byte, uint8 [out / 2, in] | fp32 [out, in / group] | |

compressed-tensors:

| | codes | weight_scale | |
| --- | --- | --- | --- |
| FP8 | weight: the same | fp32 [1] | or [out, 1]: one a row; or one a block |
| NVFP4 | weight_packed: the same | the same | divided by weight_global_scale, fp32 [1] |
| INT8 | weight: the same | fp32 [out, 1] | or [1] |
| INT4 | weight_packed: code + 8, eight columns an int32 [out, in / 8] | fp32 [out, in / group] | weight_shape |

The lowest bits hold the column, or the row, that comes first. Sources: `modelopt/torch/export/quant_utils.py` of
ModelOpt 0.47, `compressed_tensors/compressors` of compressed-tensors 0.20.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill_nemo.quantization import ExportFormatName

Layout = Literal["fp8", "nvfp4", "int8", "int4_rows", "int4_columns"]  # of codes; INT4's by what shares a number

WEIGHT, PACKED, SCALE, SHAPE = "weight", "weight_packed", "weight_scale", "weight_shape"  # within a module
PROJECTIONS = ("k_proj", "v_proj")  # of keys and values
RECIPROCAL = "_global_scale"  # end of a scale's name: stored is 1 / scale
NVFP4_BLOCK = 16  # columns that share a scale
SMALLEST_BLOCK_SCALE = 2.0**-9  # of E4M3; a block of zeros has it, too
PER_NUMBER: dict[Layout, tuple[int, int]] = {  # [out, in]
    "fp8": (1, 1),
    "nvfp4": (1, 2),
    "int8": (1, 1),
    "int4_rows": (2, 1),
    "int4_columns": (1, 8),
}
DTYPES: dict[Layout, str] = {  # of codes, as safetensors names them
    "fp8": "F8_E4M3",
    "nvfp4": "U8",
    "int8": "I8",
    "int4_rows": "U8",
    "int4_columns": "I32",
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class FileFormat:
    """Names and shapes by which a format differs.

    Args:
        name: of the format.
        codes: name of the codes within a module.
        one: shape of a single scale; that of one scale a row is [out, *one].
        of_tensor: name of NVFP4's scale of the whole tensor.
        of_input: name of the scale of a layer's inputs.
        of_cache: names of the scales of keys and values, within an attention layer.
        cache: formats of keys and values that it can state.
        int4: layout of INT4.
    """

    name: ExportFormatName
    codes: Mapping[Layout, str]
    one: tuple[int, ...]
    of_tensor: str
    of_input: Mapping[Layout, str]
    of_cache: tuple[str, str]
    cache: tuple[str, ...]
    int4: Layout


MODELOPT = FileFormat(
    "modelopt",
    codes=dict.fromkeys(PER_NUMBER, WEIGHT),
    one=(),
    of_tensor="weight_scale_2",
    of_input=dict.fromkeys(PER_NUMBER, "input_scale"),
    of_cache=("k_proj.k_scale", "v_proj.v_scale"),
    cache=("fp8", "nvfp4"),
    int4="int4_rows",
)
COMPRESSED_TENSORS = FileFormat(
    "compressed-tensors",
    codes={"fp8": WEIGHT, "nvfp4": PACKED, "int8": WEIGHT, "int4_columns": PACKED},
    one=(1,),
    of_tensor="weight" + RECIPROCAL,
    of_input={**dict.fromkeys(PER_NUMBER, "input_scale"), "nvfp4": "input" + RECIPROCAL},
    of_cache=("k_scale", "v_scale"),
    cache=("fp8",),
    int4="int4_columns",
)
FILE_FORMATS = {each.name: each for each in (MODELOPT, COMPRESSED_TENSORS)}


def unpack(stored: Tensor, layout: Layout) -> Tensor:
    """Return the fp32 values [out, in] that the stored codes stand for, without their scales."""
    if layout in ("fp8", "int8"):
        return stored.float()
    if layout == "int4_columns":
        stored = stored.contiguous().view(torch.uint8)
    low, high = stored & 0xF, stored >> 4
    if layout == "nvfp4":
        return e2m1_values(torch.stack([low, high], dim=-1).flatten(-2))
    if layout == "int4_columns":
        return torch.stack([low, high], dim=-1).flatten(-2).float() - 8
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
    codes = values.round().clamp(-8, 7).to(torch.int8)
    if layout == "int4_columns":
        codes = (codes + 8).view(torch.uint8)
        return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int32)
    codes = codes.view(torch.uint8) & 0xF
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

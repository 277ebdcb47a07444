"""Check and read quantised tensors: values of few bits, and scales that blocks of them share.

A slice is dequantised from its own values, and from the scales of the blocks that it touches. Products are in fp32:
rounded to the dtype of a parameter, they are what transformers computes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill_nemo.models.quantisation import FIELD, Quantisation
from distill_nemo.models.sources import Scales, StoredTensor

FP8, MXFP4 = "F8_E4M3", "MXFP4"  # dtype of a quantised tensor
FP8_SCALE = "_scale_inv"  # after the name of the values
BLOCKS, SCALES = "_blocks", "_scales"  # after the name of the tensor
FP8_SCALE_DTYPES = ("F32", "BF16")
MXFP4_GROUP = 32  # values that share a scale, along the input
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127

Slice = Callable[[Path, str, tuple[slice, ...]], Tensor]  # of a tensor in a file, in the dtype of the file


def merge_scales(path: Path, stored: Mapping[str, StoredTensor], quantisation: Quantisation) -> dict[str, StoredTensor]:
    """Return the tensors that values and scales stand for, in place of both.

    Args:
        path: their directory, for messages.
        stored: entries of the headers.
        quantisation: their format, as `config.json` states it.

    Raises:
        ValueError: for values without scales or with scales of another shape or dtype, and for a quantised tensor in a
            module that `config.json` lists as not quantised, by name.
    """
    merge = _merged_fp8 if quantisation.method == "fp8" else _merged_mxfp4
    found = dict(stored)
    try:
        for name in stored:
            merge(name, found, quantisation)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its {FIELD}: {error}") from None
    return found


def _merged_fp8(name: str, found: dict[str, StoredTensor], quantisation: Quantisation) -> None:
    if name not in found or found[name].dtype != FP8:
        return
    values, block = found[name], quantisation.block
    *leading, rows, columns = values.shape if len(values.shape) > 1 else (1, *values.shape)
    shape = *leading, -(-rows // block[0]), -(-columns // block[1])
    scales = _take(found, name + FP8_SCALE, name, FP8_SCALE_DTYPES, shape)
    found[name] = values._replace(scales=Scales(scales.file, block))
    _check_listed(name, quantisation)


def _merged_mxfp4(name: str, found: dict[str, StoredTensor], quantisation: Quantisation) -> None:
    if not name.endswith(BLOCKS):
        return
    whole, blocks = name.removesuffix(BLOCKS), found[name]
    if whole in found or len(blocks.shape) != 4:
        raise ValueError(f"{name:.120} {blocks.shape} must have 4 dimensions, and {whole:.120} must not be stored too")
    experts, outputs, groups, _ = blocks.shape
    _take(found, name, whole, ("U8",), (experts, outputs, groups, MXFP4_GROUP // 2))
    scales = _take(found, whole + SCALES, whole, ("U8",), (experts, outputs, groups))
    shape = experts, groups * MXFP4_GROUP, outputs
    found[whole] = StoredTensor(blocks.file, MXFP4, shape, Scales(scales.file, quantisation.block))
    _check_listed(whole, quantisation)


def _take(
    found: dict[str, StoredTensor], name: str, of: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> StoredTensor:
    """Remove and return an entry, checked."""
    if name not in found:
        raise ValueError(f"{of:.120} is quantised, but {name:.120} is missing")
    taken = found.pop(name)
    if taken.dtype not in dtypes or taken.shape != shape:
        raise ValueError(f"{name:.120} is {taken.dtype} {taken.shape}, must be {' or '.join(dtypes)} {shape}")
    return taken


def _check_listed(name: str, quantisation: Quantisation) -> None:
    if quantisation.leaves_plain(name.rpartition(".")[0]):
        raise ValueError(f"{name:.120} is quantised, but modules_to_not_convert lists its module")


def read_quantised(read: Slice, name: str, tensor: StoredTensor, index: tuple[slice, ...]) -> Tensor:
    """Return a slice of a quantised tensor in fp32.

    Args:
        read: reads slices of stored tensors.
        name: of the tensor.
        tensor: its entry, as `merge_scales` returns it.
        index: start and stop along every dimension; a step only along the last one of MXFP4.
    """
    assert tensor.scales is not None
    if tensor.dtype == MXFP4:
        return _read_mxfp4(read, name, tensor, tensor.scales, index)
    assert all(part.step is None for part in index), "blocks are of consecutive rows and columns"
    *leading, rows, columns = index
    sides = list(zip((-2, -1), (rows, columns), tensor.scales.block, strict=True))
    touched = (slice(part.start // size, -(-part.stop // size)) for _, part, size in sides)
    scales = read(tensor.scales.file, name + FP8_SCALE, (*leading, *touched)).float()
    for dim, part, size in sides:
        scales = scales.repeat_interleave(size, dim).narrow(dim, part.start % size, part.stop - part.start)
    return read(tensor.file, name, index).float().mul_(scales)


def _read_mxfp4(read: Slice, name: str, tensor: StoredTensor, scales: Scales, index: tuple[slice, ...]) -> Tensor:
    experts, inputs, outputs = index
    touched = slice(inputs.start // MXFP4_GROUP, -(-inputs.stop // MXFP4_GROUP))
    codes = read(tensor.file, name + BLOCKS, (experts, outputs, touched, slice(0, MXFP4_GROUP // 2)))
    exponents = read(scales.file, name + SCALES, (experts, outputs, touched)).int() - E8M0_BIAS
    pairs = torch.stack([codes & 0xF, codes >> 4], dim=-1)  # the lower half of a byte comes first
    values = torch.tensor(E2M1)[pairs.flatten(-2).int()].ldexp(exponents[..., None])
    first = inputs.start % MXFP4_GROUP
    return values.flatten(-2).narrow(-1, first, inputs.stop - inputs.start).transpose(-1, -2)

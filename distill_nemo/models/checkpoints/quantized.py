"""Check and read quantised tensors: values of few bits, and scales that blocks of them share.

A slice is dequantised from its own values, and from the scales of the blocks that it touches. Products are in fp32:
rounded to the dtype of a parameter, they are what transformers computes. Scales of activations and of the key-value
cache are left out: a model that is read computes with plain ones.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill_nemo.models.checkpoints.file_formats import (
    COMPRESSED_TENSORS,
    DTYPES,
    MODELOPT,
    NVFP4_BLOCK,
    PER_NUMBER,
    RECIPROCAL,
    SCALE,
    SHAPE,
    WEIGHT,
    FileFormat,
    Layout,
    e2m1_values,
    unpack,
)
from distill_nemo.models.sources import Scales, StoredTensor
from distill_nemo.models.stored_quantization import FIELD, StoredQuantization

FP8, MXFP4 = "F8_E4M3", "MXFP4"  # dtype of a quantised tensor
FP8_SCALE = "_scale_inv"  # after the name of the values
BLOCKS, SCALES = "_blocks", "_scales"  # after the name of the tensor
SCALE_DTYPES = ("F32", "BF16")
ONE = ((), (1,))  # shapes of a single number
MXFP4_GROUP = 32  # values that share a scale, along the input
E8M0_BIAS = 127
CODES: dict[str, tuple[FileFormat, Layout]] = {  # dtype of a quantised tensor
    f"{each.name.upper()}_{layout.upper()}": (each, layout)
    for each in (MODELOPT, COMPRESSED_TENSORS)
    for layout in each.codes
}

Slice = Callable[[Path, str, tuple[slice, ...]], Tensor]  # of a tensor in a file, in the dtype of the file


def merge_scales(
    path: Path, stored: Mapping[str, StoredTensor], quantization: StoredQuantization
) -> dict[str, StoredTensor]:
    """Return the tensors that values and scales stand for, in place of both.

    Args:
        path: their directory, for messages.
        stored: entries of the headers.
        quantization: their format, as `config.json` states it.

    Raises:
        ValueError: for values without scales or with scales of another shape or dtype, and for a quantised tensor in a
            module that `config.json` lists as not quantised, by name.
    """
    merge = {
        "fp8": _merged_fp8,
        "mxfp4": _merged_mxfp4,
        "modelopt": _merged_modelopt,
        "compressed-tensors": _merged_compressed,
    }[quantization.method]
    found = dict(stored)
    try:
        for name in stored:
            merge(name, found, quantization)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its {FIELD}: {error}") from None
    return found


def _merged_fp8(name: str, found: dict[str, StoredTensor], quantization: StoredQuantization) -> None:
    if name not in found or found[name].dtype != FP8:
        return
    values, block = found[name], quantization.block
    *leading, rows, columns = values.shape if len(values.shape) > 1 else (1, *values.shape)
    shape = *leading, -(-rows // block[0]), -(-columns // block[1])
    scales = _take(found, name + FP8_SCALE, name, SCALE_DTYPES, shape)
    found[name] = values._replace(scales=Scales(scales.file, block))
    _check_listed(name, quantization)


def _merged_mxfp4(name: str, found: dict[str, StoredTensor], quantization: StoredQuantization) -> None:
    if not name.endswith(BLOCKS):
        return
    whole, blocks = name.removesuffix(BLOCKS), found[name]
    if whole in found or len(blocks.shape) != 4:
        raise ValueError(f"{name:.120} {blocks.shape} must have 4 dimensions, and {whole:.120} must not be stored too")
    experts, outputs, groups, _ = blocks.shape
    _take(found, name, whole, ("U8",), (experts, outputs, groups, MXFP4_GROUP // 2))
    scales = _take(found, whole + SCALES, whole, ("U8",), (experts, outputs, groups))
    shape = experts, groups * MXFP4_GROUP, outputs
    found[whole] = StoredTensor(blocks.file, MXFP4, shape, Scales(scales.file, quantization.block))
    _check_listed(whole, quantization)


def _merged_modelopt(name: str, found: dict[str, StoredTensor], quantization: StoredQuantization) -> None:
    module, _, end = name.rpartition(".")
    if name.endswith(MODELOPT.of_cache) and found[name].shape in ONE:
        del found[name]
    if end != "weight" or name not in found or found[name].dtype not in ("F8_E4M3", "I8", "U8"):
        return
    stored, of_scale = found[name], found.get(f"{module}.{SCALE}")
    if len(stored.shape) != 2:
        raise ValueError(f"{name:.120} is {stored.dtype} {stored.shape}: a quantised weight must have 2 dimensions")
    layout = _layout(stored.dtype, of_scale.dtype if of_scale is not None else "")
    _merge_codes(name, stored, MODELOPT, layout, found, quantization)


def _merge_codes(
    name: str,
    stored: StoredTensor,
    form: FileFormat,
    layout: Layout,
    found: dict[str, StoredTensor],
    quantization: StoredQuantization,
) -> None:
    """Put the weight `name` in the place of its codes and scales."""
    module = name.rpartition(".")[0]
    (rows, columns), (in_rows, in_columns) = stored.shape, PER_NUMBER[layout]
    shape = rows, columns = rows * in_rows, columns * in_columns
    scales, block = _scales_of(name, form, layout, shape, found, quantization.block)
    of_tensor = _take(found, f"{module}.{form.of_tensor}", name, ("F32",), *ONE).file if layout == "nvfp4" else None
    if f"{module}.{form.of_input[layout]}" in found:
        dtypes = ("F32",) if form is MODELOPT or layout == "nvfp4" else (*SCALE_DTYPES, "F16")
        _take(found, f"{module}.{form.of_input[layout]}", name, dtypes, *ONE)
    dtype = f"{form.name.upper()}_{layout.upper()}"
    found[name] = StoredTensor(stored.file, dtype, shape, Scales(scales.file, block, of_tensor))
    _check_listed(name, quantization)


def _merged_compressed(name: str, found: dict[str, StoredTensor], quantization: StoredQuantization) -> None:
    module, _, end = name.rpartition(".")
    if end in COMPRESSED_TENSORS.of_cache and name in found and found[name].shape in ONE:
        del found[name]
    if name not in found:
        return
    dtype = found[name].dtype
    layouts: list[Layout] = [
        each for each, codes in COMPRESSED_TENSORS.codes.items() if (codes, DTYPES[each]) == (end, dtype)
    ]
    if not layouts:
        return
    layout = layouts[0]
    stored, weight = found.pop(name), f"{module}.{WEIGHT}"
    if weight in found or len(stored.shape) != 2:
        raise ValueError(f"{name:.120} {stored.shape} must have 2 dimensions, and {weight:.120} must not be stored too")
    if layout == "int4_columns":
        _take(found, f"{module}.{SHAPE}", name, ("I64", "I32"), (2,))
    _merge_codes(weight, stored, COMPRESSED_TENSORS, layout, found, quantization)


def _layout(dtype: str, of_scale: str) -> Layout:
    if dtype != "U8":
        return "int8" if dtype == "I8" else "fp8"
    return "nvfp4" if of_scale == "F8_E4M3" else "int4_rows"


def _scales_of(
    name: str,
    form: FileFormat,
    layout: Layout,
    shape: tuple[int, int],
    found: dict[str, StoredTensor],
    block: tuple[int, int],
) -> tuple[StoredTensor, tuple[int, int]]:
    """Remove a weight's scales. Return them, and the rows and columns that share one."""
    (rows, columns), of_scale = shape, f"{name.removesuffix('weight')}{SCALE}"
    dtypes = SCALE_DTYPES if form is MODELOPT else (*SCALE_DTYPES, "F16")
    if layout == "nvfp4":
        blocks = (rows, -(-columns // NVFP4_BLOCK))
        return _take(found, of_scale, name, ("F8_E4M3",), blocks), (1, NVFP4_BLOCK)
    if layout in ("int4_rows", "int4_columns"):
        groups = found[of_scale].shape[-1] if of_scale in found and len(found[of_scale].shape) == 2 else 1
        if groups < 1 or columns % groups:
            raise ValueError(f"{of_scale:.120} has {groups} groups, which do not divide {columns} columns")
        return _take(found, of_scale, name, dtypes, (rows, groups)), (1, columns // groups)
    if layout == "fp8" and block != (0, 0):
        blocks = -(-rows // block[0]), -(-columns // block[1])
        return _take(found, of_scale, name, dtypes, blocks), block
    of_rows, single = (rows, *form.one), () if (form, layout) == (MODELOPT, "int8") else ONE
    taken = _take(found, of_scale, name, dtypes, of_rows, *single)
    return taken, ((1, columns) if taken.shape == of_rows else shape)


def _take(
    found: dict[str, StoredTensor], name: str, of: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> StoredTensor:
    """Remove and return an entry, checked."""
    if name not in found:
        raise ValueError(f"{of:.120} is quantised, but {name:.120} is missing")
    taken = found.pop(name)
    if taken.dtype not in dtypes or taken.shape not in shapes:
        allowed = f"{' or '.join(dtypes)} {' or '.join(map(str, shapes))}"
        raise ValueError(f"{name:.120} is {taken.dtype} {taken.shape}, must be {allowed}")
    return taken


def _check_listed(name: str, quantization: StoredQuantization) -> None:
    if quantization.leaves_plain(name.rpartition(".")[0]):
        field = "modules_to_not_convert" if quantization.method in ("fp8", "mxfp4") else "ignore"
        raise ValueError(f"{name:.120} is quantised, but {field} lists its module")


def read_quantized(read: Slice, name: str, tensor: StoredTensor, index: tuple[slice, ...]) -> Tensor:
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
    if tensor.dtype in CODES:
        return _read_codes(read, name, tensor, tensor.scales, (index[0], index[1]))
    touched = _touched(index, tensor.scales.block)
    scales = read(tensor.scales.file, name + FP8_SCALE, (*index[:-2], *touched)).float()
    return read(tensor.file, name, index).float().mul_(_expanded(scales, index, tensor.scales.block))


def _touched(index: tuple[slice, ...], block: tuple[int, int]) -> tuple[slice, slice]:
    """Return the blocks that hold the rows and columns of a slice."""
    rows, columns = (
        slice(part.start // size, -(-part.stop // size)) for part, size in zip(index[-2:], block, strict=True)
    )
    return rows, columns


def _expanded(scales: Tensor, index: tuple[slice, ...], block: tuple[int, int]) -> Tensor:
    """Repeat the scales of the touched blocks for each value of a slice."""
    for dim, part, size in zip((-2, -1), index[-2:], block, strict=True):
        first, last = part.start % size, part.start % size + part.stop - part.start
        scales = scales.repeat_interleave(size, dim).narrow(dim, first, last - first)
    return scales


def _read_codes(read: Slice, name: str, tensor: StoredTensor, scales: Scales, index: tuple[slice, slice]) -> Tensor:
    (form, layout), module = CODES[tensor.dtype], name.removesuffix("weight")
    touched = _touched(index, scales.block)
    of_tensor, of_row = scales.block == tensor.shape, scales.block[1] == tensor.shape[1]
    stored = () if of_tensor else touched[:1] if of_row else touched
    found = read(scales.file, module + SCALE, stored).float().reshape([part.stop - part.start for part in touched])
    _check_scales(name, found, zero=layout == "nvfp4")  # of a block of values that round to 0
    if scales.of_tensor is not None:
        of_all = read(scales.of_tensor, module + form.of_tensor, ()).reshape(())
        _check_scales(name, of_all)
        found = found / of_all if form.of_tensor.endswith(RECIPROCAL) else found * of_all
    packed = tuple(slice(p.start // n, -(-p.stop // n)) for p, n in zip(index, PER_NUMBER[layout], strict=True))
    values = unpack(read(tensor.file, module + form.codes[layout], packed), layout)
    for dim, (part, size) in enumerate(zip(index, PER_NUMBER[layout], strict=True)):
        values = values.narrow(dim, part.start % size, part.stop - part.start)
    return values * _expanded(found, index, scales.block)


def _check_scales(name: str, scales: Tensor, zero: bool = False) -> None:
    if not (scales.isfinite() & ((scales > 0) | (zero & (scales == 0)))).all():
        raise ValueError(
            f"{name:.120} has scales that are not positive numbers: the checkpoint is damaged; get it again"
        )


def _read_mxfp4(read: Slice, name: str, tensor: StoredTensor, scales: Scales, index: tuple[slice, ...]) -> Tensor:
    experts, inputs, outputs = index
    touched = slice(inputs.start // MXFP4_GROUP, -(-inputs.stop // MXFP4_GROUP))
    codes = read(tensor.file, name + BLOCKS, (experts, outputs, touched, slice(0, MXFP4_GROUP // 2)))
    exponents = read(scales.file, name + SCALES, (experts, outputs, touched)).int() - E8M0_BIAS
    pairs = torch.stack([codes & 0xF, codes >> 4], dim=-1)  # the lower half of a byte comes first
    values = e2m1_values(pairs.flatten(-2)).ldexp(exponents[..., None])
    first = inputs.start % MXFP4_GROUP
    return values.flatten(-2).narrow(-1, first, inputs.stop - inputs.start).transpose(-1, -2)

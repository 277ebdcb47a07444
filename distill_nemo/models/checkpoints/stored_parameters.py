"""Parameters as an export stores them: as they are, rounded as the student computes with them, or as codes and scales.

Each is rounded by its own quantizer, so the codes are those of the values that the student computes with.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.file_formats import (
    DTYPES,
    NVFP4_BLOCK,
    PER_NUMBER,
    PROJECTIONS,
    RECIPROCAL,
    SCALE,
    SHAPE,
    SMALLEST_BLOCK_SCALE,
    FileFormat,
    Layout,
    pack,
)
from distill_nemo.models.checkpoints.local_parameters import (
    LocalParameter,
    WholeRows,
    bytes_of,
    local_parameters,
    rows_of,
    rows_to_write,
)
from distill_nemo.models.checkpoints.tensor_files import LABELS, Entries, Entry
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import Shapes
from distill_nemo.models.quantizers.convert import CACHE, quantizers_of
from distill_nemo.quantization import CACHE_FORMATS, Numbers, QuantizationConfig, format_of

Read = Callable[[Piece], Tensor]
CacheScales = dict[str, tuple[str, Tensor]]  # by the tensor that computes keys or values: name and value

LAYOUTS: dict[int | tuple[int, int], Layout] = {(4, 3): "fp8", (2, 1): "nvfp4", 8: "int8"}  # by num_bits
LARGEST = {(4, 3): 448.0, (2, 1): 6.0 * 448.0, 8: 127.0, 4: 7.0}  # by num_bits; of NVFP4, times a block's scale
ROUNDING = 2.0**-21  # of code * scale in fp32, which ModelOpt computes as code / (1 / scale)


@dataclass(frozen=True)
class StoredParameter:
    """A parameter that is stored as it is."""

    parameter: LocalParameter

    def current(self) -> LocalParameter:
        """Return the parameter with the values that are stored."""
        return self.parameter

    def entries(self, shapes: Shapes) -> Entries:
        """Return dtype and shape of each tensor that it is part of.

        Args:
            shapes: of all Hugging Face tensors.
        """
        return {name: Entry(LABELS[self.parameter.tensor.dtype], shapes[name]) for name in self.names}

    @property
    def names(self) -> list[str]:
        """Hugging Face tensors that it is part of."""
        return list(self.parameter.whole_shapes())

    def rows(self) -> list[WholeRows]:
        """Return what this rank writes. Collective over the group."""
        return rows_to_write(self.current())

    def differing(self, names: Container[str], read: Read) -> Iterator[str]:
        """Yield those of `names` that are not in files, bit for bit, as they should be. Collective, like `rows`.

        Args:
            names: of tensors in files.
            read: reads them as they are stored.
        """
        if self.parameter.is_first_copy:
            yield from self.current().differing(names, read)

    def wrong(self, read: Read) -> Iterator[str]:
        """Yield its tensors that are not what this rank computes with.

        Args:
            read: reads plain and quantised ones, in fp32.
        """
        yield from self.current().differing(self.names, read)


@dataclass(frozen=True)
class RoundedParameter(StoredParameter):
    """A parameter that is stored rounded by its quantizer, in its own dtype."""

    quantizer: TensorQuantizer

    @torch.no_grad()
    def current(self) -> LocalParameter:
        """Return the parameter with the values that the student computes with."""
        return self.parameter._replace(tensor=self.quantizer(self.parameter.tensor.detach()))


@dataclass(frozen=True)
class QuantizedParameter(RoundedParameter):
    """A parameter that is stored as codes and scales.

    Args:
        numbers: that its values are rounded to.
        file_format: format of the files.
        input_scale: scale of the layer's input, if that is rounded, too.
        cache_scales: those of keys and values that the layer computes.
    """

    numbers: Numbers
    file_format: FileFormat
    input_scale: Tensor | None = None
    cache_scales: CacheScales = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Layout of the codes."""
        return LAYOUTS.get(self.numbers.num_bits, self.file_format.int4)

    @property
    def scale_2(self) -> Tensor | None:
        """Scale of the whole tensor, by which those of blocks are multiplied."""
        return scale_of(self.quantizer, self.numbers) if self.layout == "nvfp4" else None

    def entries(self, shapes: Shapes) -> Entries:
        """Return dtype and shape of codes and scales."""
        found: Entries = {}
        for name in self.names:
            (rows, columns), (in_rows, in_columns) = shapes[name], PER_NUMBER[self.layout]
            found[self._codes(name)] = Entry(DTYPES[self.layout], (rows // in_rows, columns // in_columns))
            block = self.numbers.block or columns
            if self.layout == "nvfp4":
                found[_beside(name, SCALE)] = Entry("F8_E4M3", (rows, columns // block))
            elif self.layout != "fp8":
                shape = (rows, *self.file_format.one) if self.layout == "int8" else (rows, columns // block)
                found[_beside(name, SCALE)] = Entry("F32", shape)
            single = self._single(name)
            found |= {each: Entry(LABELS[value.dtype], tuple(value.shape)) for each, value in single.items()}
        return found

    def _codes(self, name: str) -> str:
        return _beside(name, self.file_format.codes[self.layout])

    def _single(self, name: str) -> dict[str, Tensor]:
        """Return what is stored once beside a Hugging Face tensor: scales of the whole tensor, input and cache."""
        of_tensor, of_input = self.file_format.of_tensor, self.file_format.of_input[self.layout]
        scales = {_beside(name, of_tensor): self.scale_2, _beside(name, of_input): self.input_scale}
        scales |= dict([self.cache_scales[name]]) if name in self.cache_scales else {}
        if self.layout == "fp8":
            scales[_beside(name, SCALE)] = scale_of(self.quantizer, self.numbers)
        found = {
            each: (1 / scale if each.endswith(RECIPROCAL) else scale).reshape(self.file_format.one)
            for each, scale in scales.items()
            if scale is not None
        }
        if self.layout == "int4_columns":
            found[_beside(name, SHAPE)] = torch.tensor(self.parameter.whole_shapes()[name])
        return found

    @torch.no_grad()
    def rows(self) -> list[WholeRows]:
        """Return the codes and scales that this rank writes. Collective over the group."""
        values, scales = rows_to_write(self.current()), rows_to_write(self.parameter._replace(tensor=self._scales()))
        pairs = zip(values, scales, strict=True)
        return [each for of_values, of_scales in pairs for each in self._packed(of_values, of_scales.rows)]

    def _packed(self, values: WholeRows, scales: Tensor) -> Iterator[WholeRows]:
        name, first, rows = values
        in_rows = PER_NUMBER[self.layout][0]
        assert first % in_rows == len(rows) % in_rows == 0, f"{name}: two rows share a byte"
        whole_scales = scales if self.scale_2 is None else scales * self.scale_2
        yield WholeRows(self._codes(name), first // in_rows, pack(rows.float() / whole_scales, self.layout))
        if self.layout == "nvfp4":
            yield WholeRows(_beside(name, SCALE), first, scales[:, ::NVFP4_BLOCK].to(torch.float8_e4m3fn))
        elif self.layout == "int8":
            yield WholeRows(_beside(name, SCALE), first, scales[:, 0].reshape(-1, *self.file_format.one))
        elif self.layout != "fp8":
            yield WholeRows(_beside(name, SCALE), first, scales[:, :: self.numbers.block])
        yield from (WholeRows(each, 0, value) for each, value in self._single(name).items() if first == 0)

    def _scales(self) -> Tensor:
        """Return the stored scale of each value of this rank's part, in fp32."""
        tensor = self.parameter.tensor.detach()
        if self.scale_2 is not None:
            amax = tensor.float().unflatten(1, (-1, NVFP4_BLOCK)).abs().amax(-1)
            scales = (amax / (6 * self.scale_2)).clamp(SMALLEST_BLOCK_SCALE, 448).to(torch.float8_e4m3fn).float()
        else:
            scales = scale_of(self.quantizer, self.numbers)
            scales = scales.reshape(len(tensor), -1) if scales.dim() else scales.reshape(1, 1)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(tensor.shape[1] // scales.shape[1], dim=1)
        return scales.expand_as(tensor).contiguous()

    def differing(self, names: Container[str], read: Read) -> Iterator[str]:
        """Yield those of `names` that are not in files, bit for bit, as they should be. Collective, like `rows`."""
        if not any(self._codes(name) in names for name in self.names):
            return
        for name, first, rows in self.rows():
            index = (slice(first, first + len(rows)), *(slice(0, n) for n in rows.shape[1:])) if rows.dim() else ()
            if name in names and not torch.equal(bytes_of(read(Piece(name, index))), bytes_of(rows.cpu())):
                yield name

    def wrong(self, read: Read) -> Iterator[str]:
        """Yield its tensors that, dequantised, are not what this rank computes with, and what is stored once."""
        current = self.current()
        for piece, rows in rows_of(current.pieces, current.tensor):
            if piece.name:
                values = rows.float().cpu()
                allowed = max(torch.finfo(rows.dtype).eps / 2, ROUNDING) * values.abs()
                if not ((read(piece) - values).abs() <= allowed).all():
                    yield piece.name
        for name in self.names:
            for each, value in self._single(name).items():
                if not torch.equal(read(Piece(each, tuple(slice(0, n) for n in value.shape))), value.cpu()):
                    yield each


def scale_of(quantizer: TensorQuantizer, numbers: Numbers) -> Tensor:
    """Return the scales of a quantizer, in fp32 and in the shape of its amax: amax / the largest of its numbers."""
    assert isinstance(quantizer.amax, Tensor)
    return quantizer.amax.float() / LARGEST[numbers.num_bits]


def _beside(name: str, other: str) -> str:
    return name.removesuffix("weight") + other


def stored_parameters(
    chunks: list[GPTModel], model: Architecture, file_format: FileFormat | None
) -> list[StoredParameter]:
    """Return this rank's parameters as an export stores them.

    Args:
        chunks: this rank's pipeline stages.
        model: the architecture.
        file_format: of quantised ones; None: rounded, in their own dtype.
    """
    linear = format_of(model.quantization) if model.quantization else None
    found: list[StoredParameter] = []
    for chunk in chunks:
        quantizers = {each.name: each.module for each in quantizers_of(chunk)}
        for parameter in local_parameters(chunk, model):
            layer = parameter.name.removesuffix(".weight")
            of_weight = quantizers.get(f"{layer}.weight_quantizer")
            if of_weight is None:
                found.append(StoredParameter(parameter))
            elif linear is None or file_format is None:
                found.append(RoundedParameter(parameter, of_weight))
            else:
                of_input = quantizers.get(f"{layer}.input_quantizer")
                input_scale = (
                    scale_of(of_input, linear.inputs) if of_input is not None and linear.inputs is not None else None
                )
                scales = _cache_scales(parameter, quantizers, model.quantization, file_format)
                found.append(QuantizedParameter(parameter, of_weight, linear.weights, file_format, input_scale, scales))
    return found


def _cache_scales(
    parameter: LocalParameter,
    quantizers: dict[str, TensorQuantizer],
    quantization: QuantizationConfig | None,
    file_format: FileFormat,
) -> CacheScales:
    """Return the scales of the keys and values that a parameter's layer computes."""
    numbers = CACHE_FORMATS.get(quantization.kv_cache) if quantization else None
    attention = parameter.name.removesuffix("linear_qkv.weight")
    if numbers is None or attention == parameter.name:
        return {}
    found: CacheScales = {}
    for quantizer, projection, scale in zip(CACHE, PROJECTIONS, file_format.of_cache, strict=True):
        end = f"{projection}.weight"
        tensor = next(name for name in parameter.whole_shapes() if name.endswith(end))
        module = quantizers[f"{attention}core_attention.{quantizer}"]
        found[tensor] = tensor.removesuffix(end) + scale, scale_of(module, numbers)
    return found

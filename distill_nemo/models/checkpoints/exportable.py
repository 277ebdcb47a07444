"""Refuse models that an export cannot hold, from their architecture alone. Imports no Megatron."""

import re
from collections.abc import Callable, Iterable

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.file_formats import (
    COMPRESSED_TENSORS,
    FILE_FORMATS,
    PER_NUMBER,
    PROJECTIONS,
    FileFormat,
)
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import Parameter, parameters
from distill_nemo.quantization import ExportFormatName, QuantizationConfig, format_of, is_excluded

LINEAR = re.compile(r"(.+\.)?(linear_\w+|in_proj|out_proj|output_layer)\.weight")
ADVICE = "export its rounded weights: checkpoint.quantized=none for a run, quantized=none for nemo distill export"
NO_EXPORT = "train with checkpoint.export=false, and keep the Megatron checkpoint"


def check_exportable(
    model: Architecture, quantized: ExportFormatName = "modelopt", parallelism: ParallelismConfig | None = None
) -> None:
    """Refuse a model that no class of transformers can hold, or a quantised one that its format cannot.

    Args:
        model: the architecture.
        quantized: format of a quantised model's weights.
        parallelism: layout of the export; None: one process.

    Raises:
        ValueError: with the reason, and advice.
    """
    if model.block_configs is not None:
        raise ValueError(f"block_configs: transformers has no model whose layers differ; {NO_EXPORT}")
    if model.source is not None and model.source.modified_by_modelopt:
        raise ValueError(
            f"{model.name} was modified by ModelOpt (quantised, say): that cannot be exported yet; {NO_EXPORT}"
        )
    if quantized == COMPRESSED_TENSORS.name and model.quantization is None:
        raise ValueError(
            f'quantized = "{quantized}", but {model.name} is not quantised; leave it out, or train with '
            "quantization.format=..."
        )
    if quantized != "none" and model.quantization is not None:
        check_storable(model, model.quantization, parallelism or ParallelismConfig(), FILE_FORMATS[quantized])


def check_storable(
    model: Architecture, quantization: QuantizationConfig, parallelism: ParallelismConfig, file_format: FileFormat
) -> None:
    """Refuse a quantised model that a format cannot hold.

    Args:
        model: the architecture.
        quantization: format of its layers.
        parallelism: layout of the export.
        file_format: of the files.

    Raises:
        ValueError: with the tensor and the reason, and advice.
    """
    linear = format_of(quantization)
    if linear is None:
        raise ValueError(
            f"quantization.kv_cache without quantization.format is not read by vLLM; set both, or {ADVICE}"
        )
    if model.tie_word_embeddings and not is_excluded(quantization, "output_layer"):
        raise ValueError(
            f"output_layer is quantised, but its weights are those of the embedding; exclude it, or {ADVICE}"
        )
    size, is_quantized = parallelism.tensor_model_parallel_size, _is_quantized(quantization)
    shared = PER_NUMBER[file_format.int4] if linear.weights.num_bits == 4 else (1, 1)
    for parameter in filter(is_quantized, parameters(model)):
        for piece in parameter.rule(parameter.place._replace(size=size, rank=size - 1)):
            _check_piece(piece, shared)
    if quantization.kv_cache != "none":
        _check_cache(model, quantization, file_format, is_quantized)


def _check_cache(
    model: Architecture,
    quantization: QuantizationConfig,
    file_format: FileFormat,
    is_quantized: Callable[[Parameter], bool],
) -> None:
    if quantization.kv_cache not in file_format.cache:
        raise ValueError(
            f'quantization.kv_cache = "{quantization.kv_cache}" cannot be stated in the format {file_format.name}; '
            f"choose {' or '.join(file_format.cache)} or quantized=modelopt, or {ADVICE}"
        )
    names = {piece.name for parameter in parameters(model) for piece in parameter.pieces}
    if not all(any(f".{each}.weight" in name for name in names) for each in PROJECTIONS):
        raise ValueError(
            f"quantization.kv_cache: {model.family} has no {' and '.join(PROJECTIONS)} to name its scales; {ADVICE}"
        )
    _check_cache_layers(parameter for parameter in parameters(model) if not is_quantized(parameter))


def _check_cache_layers(plain: Iterable[Parameter]) -> None:
    """Refuse keys and values that plain layers compute: scales of the cache are stored beside quantised ones."""
    for parameter in plain:
        if parameter.name.endswith("linear_qkv.weight"):
            name = f"decoder.layers.{parameter.place.number}.{parameter.name.removesuffix('.weight')}"
            raise ValueError(
                f"quantization.kv_cache: {name} is in quantization.exclude, so scales of its keys and values have no "
                f"place; take it out, or {ADVICE}"
            )


def _is_quantized(quantization: QuantizationConfig) -> Callable[[Parameter], bool]:
    def is_quantized(parameter: Parameter) -> bool:
        layer = parameter.name.removesuffix(".weight")
        name = layer if layer == "output_layer" else f"decoder.layers.{parameter.place.number}.{layer}"
        return LINEAR.fullmatch(parameter.name) is not None and not is_excluded(quantization, name)

    return is_quantized


def _check_piece(piece: Piece, shared: tuple[int, int]) -> None:
    """Refuse a part that no rank can write by itself, given the rows and columns that share a number in the file."""
    if not piece.name:
        return
    rows, columns = piece.index[0], piece.index[-1]
    if piece.axes is not None or not piece.name.endswith(".weight") or len(piece.index) != 2 or rows.step is not None:
        raise ValueError(
            f"{piece.name} holds several matrices, or one transposed: quantised, no reader has it; {ADVICE}"
        )
    if rows.start % shared[0] or rows.stop % shared[0]:
        raise ValueError(
            f"{piece.name}: a tensor-parallel rank has its rows {rows.start} to {rows.stop}, but INT4 holds two rows a "
            f"byte; use a smaller tensor_model_parallel_size, or {ADVICE}"
        )
    if columns.stop % shared[1]:
        raise ValueError(f"{piece.name} has {columns.stop} columns, but INT4 holds eight a number; {ADVICE}")

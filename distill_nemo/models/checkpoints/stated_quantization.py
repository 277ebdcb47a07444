"""State the format of quantised weights beside them, as its own tools do, and refuse what it cannot hold."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import modelopt
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.file_formats import MODELOPT, PER_NUMBER, SCALE, FileFormat
from distill_nemo.models.checkpoints.stored_parameters import PROJECTIONS
from distill_nemo.models.checkpoints.tensor_files import Entry
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import Parameter, parameters
from distill_nemo.models.stored_quantization import FIELD, MODELOPT_FILE
from distill_nemo.quantization import CACHE_FORMATS, Numbers, QuantizationConfig, format_of, is_excluded
from distill_nemo.runtime.files import read_object_if_any

LINEAR = re.compile(r"(.+\.)?(linear_\w+|in_proj|out_proj|output_layer)\.weight")
ADVICE = "export its rounded weights: checkpoint.quantized=none for a run, quantized=none for nemo distill export"
COMPRESSED_TENSORS_VERSION = "0.20.1"  # that describes its formats as below
COMPRESSED_FORMATS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4_weights": "nvfp4-pack-quantized",
    "int8": "int-quantized",
    "int4_weights": "pack-quantized",
}


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


def state_quantization(
    directory: Path, quantization: QuantizationConfig, file_format: FileFormat, stored: Mapping[str, Entry]
) -> None:
    """State the format in `config.json`, and ModelOpt's in `hf_quant_config.json`, too.

    Args:
        directory: of the export.
        quantization: format of the student.
        file_format: of the files.
        stored: tensors of the export, by their names in files.
    """
    matrices = {name.removesuffix(".weight") for name, entry in stored.items() if _is_matrix(name, entry)}
    plain = sorted(name for name in {*matrices, "lm_head"} if f"{name}.{SCALE}" not in stored)
    if file_format is MODELOPT:
        producer = {"name": "modelopt", "version": modelopt.__version__}  # readers look for the name
        by_modelopt = {"producer": producer, "quantization": _described(quantization, plain)}
        (directory / MODELOPT_FILE).write_text(json.dumps(by_modelopt, indent=2))
        stated = convert_hf_quant_config_format(by_modelopt)
    else:
        stated = _compressed(quantization, plain)
    config = read_object_if_any(directory / "config.json") | {FIELD: stated}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _is_matrix(name: str, entry: Entry) -> bool:
    return name.endswith(".weight") and len(entry.shape) == 2


def _described(quantization: QuantizationConfig, plain: list[str]) -> dict[str, Any]:
    linear = format_of(quantization)
    assert linear is not None
    cache = None if quantization.kv_cache == "none" else quantization.kv_cache.upper()
    found: dict[str, Any] = {"quant_algo": linear.algorithm, "kv_cache_quant_algo": cache, "exclude_modules": plain}
    if linear.weights.block is not None:
        found["group_size"] = linear.weights.block
    if linear.algorithm == "W4A16_AWQ":
        found |= {"has_zero_point": False, "pre_quant_scale": False}
    return found


def _compressed(quantization: QuantizationConfig, plain: list[str]) -> dict[str, Any]:
    """Return what compressed-tensors writes into `config.json`."""
    linear, cache = format_of(quantization), CACHE_FORMATS.get(quantization.kv_cache)
    assert linear is not None
    name = COMPRESSED_FORMATS[quantization.format]
    inputs = _arguments(linear.inputs) if linear.inputs else None
    if inputs and inputs["strategy"] == "tensor_group":
        inputs["dynamic"] = "local"  # scales of blocks are; that of the tensor is stored
    group = {"targets": ["Linear"], "weights": _arguments(linear.weights), "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "version": COMPRESSED_TENSORS_VERSION,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None, "format": name}},
        "ignore": plain,
        "kv_cache_scheme": _arguments(cache) if cache else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _arguments(numbers: Numbers) -> dict[str, Any]:
    """Return the fields of its `QuantizationArgs`."""
    bits = numbers.num_bits
    strategy = {"tensor": "tensor_group" if numbers.block else "tensor", "row": "channel", "block": "group"}[
        numbers.scope
    ]
    found: dict[str, Any] = {
        "num_bits": 1 + sum(bits) if isinstance(bits, tuple) else bits,
        "type": "float" if isinstance(bits, tuple) else "int",
        "symmetric": True,
        "group_size": numbers.block,
        "strategy": strategy,
        "dynamic": False,
    }
    return found | ({"scale_dtype": "torch.float8_e4m3fn"} if strategy == "tensor_group" else {})

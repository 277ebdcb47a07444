"""State the format of quantised weights beside them, as ModelOpt's exporter does, and refuse what it cannot hold."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import modelopt
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.modelopt_format import CACHE_SCALES, SCALE
from distill_nemo.models.checkpoints.tensor_files import Entry
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import Parameter, parameters
from distill_nemo.models.quantisation import FIELD, MODELOPT_FILE
from distill_nemo.quantization import QuantizationConfig, format_of, is_excluded
from distill_nemo.runtime.files import read_object_if_any

LINEAR = re.compile(r"(.+\.)?(linear_\w+|in_proj|out_proj|output_layer)\.weight")
ADVICE = (
    "export its rounded weights: checkpoint.export=false, and then nemo distill export checkpoint=... output=... "
    "quantized=false"
)


def check_storable(model: Architecture, quantization: QuantizationConfig, parallelism: ParallelismConfig) -> None:
    """Refuse a quantised model that the format cannot hold.

    Args:
        model: the architecture.
        quantization: format of its layers.
        parallelism: layout of the export.

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
    size, is_quantised = parallelism.tensor_model_parallel_size, _is_quantised(quantization)
    for parameter in filter(is_quantised, parameters(model)):
        for piece in parameter.rule(parameter.place._replace(size=size, rank=size - 1)):
            _check_piece(piece, 2 if linear.weights.num_bits == 4 else 1)
    names = {piece.name for parameter in parameters(model) for piece in parameter.pieces}
    layers = [scale.partition(".")[0] for scale in CACHE_SCALES]
    if quantization.kv_cache != "none" and not all(any(f".{each}.weight" in name for name in names) for each in layers):
        raise ValueError(
            f"quantization.kv_cache: {model.family} has no {' and '.join(layers)} to name its scales; {ADVICE}"
        )
    if quantization.kv_cache != "none":
        _check_cache_layers(parameter for parameter in parameters(model) if not is_quantised(parameter))


def _check_cache_layers(plain: Iterable[Parameter]) -> None:
    """Refuse keys and values that plain layers compute: scales of the cache are stored beside quantised ones."""
    for parameter in plain:
        if parameter.name.endswith("linear_qkv.weight"):
            name = f"decoder.layers.{parameter.place.number}.{parameter.name.removesuffix('.weight')}"
            raise ValueError(
                f"quantization.kv_cache: {name} is in quantization.exclude, so scales of its keys and values have no "
                f"place; take it out, or {ADVICE}"
            )


def _is_quantised(quantization: QuantizationConfig) -> Callable[[Parameter], bool]:
    def is_quantised(parameter: Parameter) -> bool:
        layer = parameter.name.removesuffix(".weight")
        name = layer if layer == "output_layer" else f"decoder.layers.{parameter.place.number}.{layer}"
        return LINEAR.fullmatch(parameter.name) is not None and not is_excluded(quantization, name)

    return is_quantised


def _check_piece(piece: Piece, rows_per_byte: int) -> None:
    if not piece.name:
        return
    rows = piece.index[0]
    if piece.axes is not None or not piece.name.endswith(".weight") or len(piece.index) != 2 or rows.step is not None:
        raise ValueError(
            f"{piece.name} holds several matrices, or one transposed: quantised, no reader has it; {ADVICE}"
        )
    if rows.start % rows_per_byte or rows.stop % rows_per_byte:
        raise ValueError(
            f"{piece.name}: a tensor-parallel rank has its rows {rows.start} to {rows.stop}, but INT4 holds two rows a "
            f"byte; use a smaller tensor_model_parallel_size, or {ADVICE}"
        )


def state_quantisation(directory: Path, quantization: QuantizationConfig, stored: Mapping[str, Entry]) -> None:
    """Write `hf_quant_config.json`, and the same in other words into `config.json`.

    Args:
        directory: of the export.
        quantization: format of the student.
        stored: tensors of the export, by their names in files.
    """
    matrices = {name.removesuffix(".weight") for name, entry in stored.items() if _is_matrix(name, entry)}
    plain = sorted(name for name in {*matrices, "lm_head"} if f"{name}.{SCALE}" not in stored)
    producer = {"name": "modelopt", "version": modelopt.__version__}  # whose format it is: readers look for the name
    stated = {"producer": producer, "quantization": _described(quantization, plain)}
    (directory / MODELOPT_FILE).write_text(json.dumps(stated, indent=2))
    config = read_object_if_any(directory / "config.json") | {FIELD: convert_hf_quant_config_format(stated)}
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

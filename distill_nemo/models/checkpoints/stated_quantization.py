"""State the format of quantised weights beside them, as its own tools do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from distill_nemo.models.checkpoints.file_formats import MODELOPT, SCALE, FileFormat
from distill_nemo.models.checkpoints.tensor_files import Entry
from distill_nemo.models.stored_quantization import FIELD, MODELOPT_FILE
from distill_nemo.quantization import CACHE_FORMATS, Numbers, QuantizationConfig, format_of
from distill_nemo.runtime.files import read_object_if_any

COMPRESSED_TENSORS_VERSION = "0.20.1"  # that describes its formats as below
COMPRESSED_FORMATS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4_weights": "nvfp4-pack-quantized",
    "int8": "int-quantized",
    "int4_weights": "pack-quantized",
}


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

"""Formats of quantised students: one row each. No torch: the launcher imports this file and must start quickly."""

import fnmatch
from dataclasses import dataclass, replace
from typing import Literal

from distill_nemo.fields import require, setting

FormatName = Literal["none", "fp8", "nvfp4", "nvfp4_weights", "int8", "int4_weights"]
CacheFormatName = Literal["none", "fp8", "nvfp4"]
ExportFormatName = Literal["modelopt", "compressed-tensors", "none"]
Scope = Literal["tensor", "row", "block"]


@dataclass
class QuantizationConfig:
    """Number format of the student, for quantisation-aware distillation. The teacher is not quantised."""

    format: FormatName = setting(
        "none",
        "none: as the student's checkpoint; fp8: weights and activations in E4M3; nvfp4: both in E2M1, blocks of 16; "
        "nvfp4_weights: weights only; int8: both; int4_weights: weights only, blocks of 128",
    )
    kv_cache: CacheFormatName = setting("none", "keys and values of attention")
    block_size: int | None = setting(None, "int4_weights only: weights that share a scale; None: 128", at_least=8)
    exclude: list[str] = setting(
        ["output_layer"], "linear layers that are not quantised, by Megatron's names; * matches any text"
    )
    calibration_samples: int = setting(
        512, "samples from the start of data.train that calibrate the activations' ranges", at_least=1
    )


@dataclass(frozen=True)
class Numbers:
    """Numbers that a tensor is rounded to. A scale follows from the largest absolute value, the amax.

    Args:
        num_bits: of an integer, or those of exponent and mantissa of a float, as ModelOpt states them.
        scope: what has an amax of its own, which calibration fixes: the tensor, a row, or a block of a row.
        block: consecutive numbers of a row that share a scale; None: all that share an amax.
    """

    num_bits: int | tuple[int, int]
    scope: Scope
    block: int | None = None


@dataclass(frozen=True)
class Format:
    """Format of the linear layers of a quantised model.

    Args:
        algorithm: `quant_algo` of ModelOpt's `hf_quant_config.json`.
        weights: numbers of the weights.
        inputs: numbers of the activations that are multiplied with them; None: as they are.
    """

    algorithm: str
    weights: Numbers
    inputs: Numbers | None


E4M3 = Numbers((4, 3), "tensor")
NVFP4 = Numbers((2, 1), "tensor", block=16)  # each block's scale is an E4M3 number times one of the tensor
FORMATS = {
    "fp8": Format("FP8", E4M3, E4M3),
    "nvfp4": Format("NVFP4", NVFP4, NVFP4),
    "nvfp4_weights": Format("W4A16_NVFP4", NVFP4, None),
    "int8": Format("W8A8_SQ_PER_CHANNEL", Numbers(8, "row"), Numbers(8, "tensor")),
    "int4_weights": Format("W4A16_AWQ", Numbers(4, "block", block=128), None),
}
CACHE_FORMATS = {"fp8": E4M3, "nvfp4": NVFP4}


def is_quantized(config: QuantizationConfig) -> bool:
    """Return True if anything of a model is quantised."""
    return config.format != "none" or config.kv_cache != "none"


def format_of(config: QuantizationConfig) -> Format | None:
    """Return the format of the linear layers, with the block size that the config states; None: they stay plain."""
    found = FORMATS.get(config.format)
    if found is None or config.block_size is None:
        return found
    return replace(found, weights=replace(found.weights, block=config.block_size))


def check_quantization(config: QuantizationConfig) -> None:
    """Refuse fields that the format does not have, and a format for no layer.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    require(
        config.block_size is None or config.format == "int4_weights",
        f'quantization.block_size = {config.block_size} needs quantization.format = "int4_weights", got '
        f'"{config.format}"; leave it unset',
    )
    require(
        config.format != "none" or config.exclude == QuantizationConfig().exclude,
        f'quantization.exclude = {config.exclude} needs a quantization.format, got "none"; leave it unset',
    )
    require(not any(set(pattern) == {"*"} for pattern in config.exclude), _nothing_left(config))


def _nothing_left(config: QuantizationConfig) -> str:
    return (
        f"quantization.exclude = {config.exclude} leaves no linear layer to quantise: leave some, or "
        'quantization.format "none"'
    )


def check_exclude(config: QuantizationConfig, layers: list[str]) -> None:
    """Refuse patterns that keep all layers plain, and those that keep none, such as Hugging Face's names.

    Args:
        config: patterns in `exclude`.
        layers: Megatron's names of the model's linear layers.

    Raises:
        ValueError: naming the pattern, and layers.
    """
    for pattern in config.exclude:
        require(
            bool(fnmatch.filter(layers, pattern)),
            f'quantization.exclude: "{pattern}" matches no linear layer that the format quantises; allowed are names '
            f"such as {', '.join((*layers[:2], layers[-1]))}, and patterns of them",
        )
    require(not all(is_excluded(config, layer) for layer in layers), _nothing_left(config))


def is_same(config: QuantizationConfig, other: QuantizationConfig, layers: list[str]) -> bool:
    """Return True if both stand for the same numbers. What ranges of activations were measured on does not matter.

    Args:
        config: of a model.
        other: of the same model.
        layers: Megatron's names of its linear layers.
    """
    plain, other_plain = ([is_excluded(each, layer) for layer in layers] for each in (config, other))
    return (format_of(config), config.kv_cache, plain) == (format_of(other), other.kv_cache, other_plain)


def is_excluded(config: QuantizationConfig, layer: str) -> bool:
    """Return True if a linear layer stays plain.

    Args:
        config: patterns in `exclude`.
        layer: Megatron's name of it, such as `decoder.layers.3.mlp.linear_fc1`, with its number in the model.
    """
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in config.exclude)

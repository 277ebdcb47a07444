"""Quantised weights, as `quantization_config` in `config.json` or ModelOpt's `hf_quant_config.json` describes them."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from distill_nemo.models.config_fields import MAX_EXPERTS_IN_ALL_LAYERS, MAX_SIZE, Fields, shown
from distill_nemo.runtime.files import read_object, read_object_if_any

FIELD, MODELOPT_FILE = "quantization_config", "hf_quant_config.json"
MAX_MODULES = 10 * MAX_EXPERTS_IN_ALL_LAYERS
MAX_PATTERNS = 1_000  # of module names; each is compared with each module
ALGORITHMS = (  # of ModelOpt; the stored tensors say which of them each weight has
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "NVFP4",
    "W4A16_NVFP4",
    "W8A16",
    "W8A8_SQ_PER_CHANNEL",
    "W4A16_AWQ",
    "MIXED_PRECISION",
)
COMPRESSED: Literal["compressed-tensors"] = "compressed-tensors"
FLOAT_8 = tuple(("float", 8, strategy) for strategy in ("tensor", "channel", "block"))
INT_8 = tuple(("int", 8, strategy) for strategy in ("tensor", "channel"))
COMPRESSED_FORMATS = {  # of compressed-tensors: type, num_bits and strategy of weights
    "float-quantized": FLOAT_8,
    "int-quantized": INT_8,
    "naive-quantized": FLOAT_8 + INT_8,
    "nvfp4-pack-quantized": (("float", 4, "tensor_group"),),
    "pack-quantized": (("int", 4, "group"), ("int", 4, "channel")),
}


@dataclass(frozen=True)
class StoredQuantization:
    """Format of quantised weights.

    Args:
        method: `fp8`: E4M3 values and a scale for each block; `mxfp4`: E2M1 values and a power of two for every 32;
            `modelopt`, `compressed-tensors`: one of theirs, which the stored tensors tell apart.
        block: rows and columns of a block; (0, 0) where the stored tensors tell.
        plain_modules: names, or beginnings or endings of names, of modules that are not quantised; of `modelopt`, names
            or patterns; of `compressed-tensors`, names.
    """

    method: Literal["fp8", "mxfp4", "modelopt", "compressed-tensors"]
    block: tuple[int, int]
    plain_modules: frozenset[str]

    def leaves_plain(self, module: str) -> bool:
        """Return True if the module's weights are not quantised.

        A `*` stands for one part between dots, and in a pattern of ModelOpt's for any text.
        """
        if self.method == "modelopt":
            patterns = (each for each in self.plain_modules if "*" in each)
            return module in self.plain_modules or any(fnmatchcase(module, each) for each in patterns)
        if self.method == "compressed-tensors":
            return module in self.plain_modules
        parts = module.split(".")
        lengths = range(1, len(parts) + 1)
        ends = [parts[:n] for n in lengths] + [parts[-n:] for n in lengths]
        return any(".".join(end) in self.plain_modules for end in ends) or any(
            _matches(pattern.split("."), end) for pattern in self.plain_modules if "*" in pattern for end in ends
        )


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True))


def with_modelopt(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a `config.json`, its missing `quantization_config` as `hf_quant_config.json` beside it states it.

    Raises:
        ValueError: if that file is no JSON object.
    """
    if config.get(FIELD):
        return config
    file = directory / MODELOPT_FILE
    stated = Fields(read_object_if_any(file), str(file)).mapping("quantization")
    if not stated.values.get("quant_algo"):
        return config
    ignored = stated.values.get("exclude_modules")
    return config | {FIELD: {"quant_method": "modelopt", "quant_algo": stated.text("quant_algo"), "ignore": ignored}}


def needs_package(directory: Path) -> bool:
    """Return True if transformers does not dequantise the weights of a Hugging Face directory by itself.

    Raises:
        ValueError: as `read_stored_quantization`.
    """
    file = directory / "config.json"
    found = read_stored_quantization(with_modelopt(read_object(file), directory), str(file))
    return found is not None and found.method in ("modelopt", COMPRESSED)


def read_stored_quantization(config: dict[str, Any], where: str) -> StoredQuantization | None:
    """Return the format of a model's quantised weights; None if there are none.

    Args:
        config: content of `config.json`.
        where: its path, for messages.

    Raises:
        ValueError: for a format that is not read here, by name, and a value of the wrong kind.
    """
    fields = Fields(config, where).mapping(FIELD)
    if not fields.values:
        return None
    method = fields.text("quant_method", "")
    if method == "mxfp4":
        return StoredQuantization("mxfp4", (1, 32), _modules(fields, "modules_to_not_convert"))
    if method == "modelopt":
        return _read_modelopt(fields)
    if method == COMPRESSED:
        return _read_compressed(fields)
    if method != "fp8":
        raise _unsupported(fields, "quant_method")
    for name, allowed in (("fmt", ("e4m3",)), ("activation_scheme", ("dynamic",)), ("scale_fmt", ("float", "ue8m0"))):
        if fields.text(name, allowed[0]) not in allowed:
            raise _unsupported(fields, name)
    block = _block(fields, "weight_block_size")
    if block is None:
        raise _unsupported(fields, "weight_block_size")
    other = "ignored_layers" if fields.values.get("modules_to_not_convert") is None else "modules_to_not_convert"
    return StoredQuantization("fp8", block, _modules(fields, other))


def _block(fields: Fields, name: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block, or None if the field states none."""
    block = fields.values.get(name)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= MAX_SIZE for n in block):
        return None
    return block[0], block[1]


def _read_modelopt(fields: Fields) -> StoredQuantization:
    if fields.text("quant_algo", "").upper() not in ALGORITHMS:
        raise _unsupported(fields, "quant_algo")
    modules = _modules(fields, "ignore")
    if sum("*" in each for each in modules) > MAX_PATTERNS:
        raise fields.wrong("ignore", f"at most {MAX_PATTERNS:,} patterns")
    return StoredQuantization("modelopt", (0, 0), modules)


def _read_compressed(fields: Fields) -> StoredQuantization:
    """Accept weights that are code * scale: no zero points, rotations or sparsity."""
    if fields.text("quantization_status", "") != "compressed":
        raise _unsupported(fields, "quantization_status")
    for name, key in (("transform_config", "config_groups"), ("sparsity_config", "format")):
        if fields.mapping(name).values.get(key) not in (None, {}, "dense"):
            raise _unsupported(fields, name)
    groups, blocks = fields.mapping("config_groups"), set[tuple[int, int]]()
    for group in map(groups.mapping, groups.values):
        weights, stated = group.mapping("weights"), group if group.values.get("format") else fields
        kinds = COMPRESSED_FORMATS.get(stated.text("format", ""))
        if kinds is None:
            raise _unsupported(stated, "format")
        if weights.values.get("symmetric") is not True:
            raise _unsupported(weights, "symmetric")
        kind = {name: weights.values.get(name) for name in ("type", "num_bits", "strategy")}
        if tuple(kind.values()) not in kinds:
            raise _unsupported(Fields({"weights": kind}, group.where), "weights")
        block = _block(weights, "block_structure") if kind["strategy"] == "block" else (0, 0)
        if block is None or blocks - {block}:
            raise _unsupported(weights, "block_structure")
        blocks.add(block)
    names = _modules(fields, "ignore")
    block = next(iter(blocks), (0, 0))
    return StoredQuantization(COMPRESSED, block, frozenset(name for name in names if not name.startswith("re:")))


def _unsupported(fields: Fields, name: str) -> ValueError:
    return ValueError(
        f"{fields.where} with {name} {shown(fields.values.get(name))} is not supported: FP8 in blocks (quant_method "
        '"fp8", fmt "e4m3", activation_scheme "dynamic", weight_block_size [rows, columns]), "mxfp4", "modelopt" '
        f'(quant_algo {", ".join(ALGORITHMS)}) and "compressed-tensors" (compressed; symmetric FP8, NVFP4, INT8, INT4) '
        "are; dequantise its weights first"
    )


def _modules(fields: Fields, name: str) -> frozenset[str]:
    values = fields.values.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.wrong(name, "a list of names or null")
    if len(values) > MAX_MODULES:
        raise fields.wrong(name, f"at most {MAX_MODULES:,} names")
    return frozenset(values)

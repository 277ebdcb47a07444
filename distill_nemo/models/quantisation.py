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


@dataclass(frozen=True)
class Quantisation:
    """Format of quantised weights.

    Args:
        method: `fp8`: E4M3 values and a scale for each block; `mxfp4`: E2M1 values and a power of two for every 32;
            `modelopt`: one of ModelOpt's, which the stored tensors tell apart.
        block: rows and columns of a block; (0, 0) for `modelopt`.
        plain_modules: names, or beginnings or endings of names, of modules that are not quantised; of `modelopt`, names
            or patterns.
    """

    method: Literal["fp8", "mxfp4", "modelopt"]
    block: tuple[int, int]
    plain_modules: frozenset[str]

    def leaves_plain(self, module: str) -> bool:
        """Return True if the module's weights are not quantised.

        A `*` stands for one part between dots, and in a pattern of ModelOpt's for any text.
        """
        if self.method == "modelopt":
            patterns = (each for each in self.plain_modules if "*" in each)
            return module in self.plain_modules or any(fnmatchcase(module, each) for each in patterns)
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


def is_modelopt(directory: Path) -> bool:
    """Return True if the weights of a Hugging Face directory are in a format of ModelOpt's, which transformers lacks.

    Raises:
        ValueError: as `read_quantisation`.
    """
    file = directory / "config.json"
    found = read_quantisation(with_modelopt(read_object(file), directory), str(file))
    return found is not None and found.method == "modelopt"


def read_quantisation(config: dict[str, Any], where: str) -> Quantisation | None:
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
        return Quantisation("mxfp4", (1, 32), _modules(fields, "modules_to_not_convert"))
    if method == "modelopt":
        return _read_modelopt(fields)
    if method != "fp8":
        raise _unsupported(fields, "quant_method")
    for name, allowed in (("fmt", ("e4m3",)), ("activation_scheme", ("dynamic",)), ("scale_fmt", ("float", "ue8m0"))):
        if fields.text(name, allowed[0]) not in allowed:
            raise _unsupported(fields, name)
    block = fields.values.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= MAX_SIZE for n in block):
        raise _unsupported(fields, "weight_block_size")
    other = "ignored_layers" if fields.values.get("modules_to_not_convert") is None else "modules_to_not_convert"
    return Quantisation("fp8", (block[0], block[1]), _modules(fields, other))


def _read_modelopt(fields: Fields) -> Quantisation:
    if fields.text("quant_algo", "").upper() not in ALGORITHMS:
        raise _unsupported(fields, "quant_algo")
    modules = _modules(fields, "ignore")
    if sum("*" in each for each in modules) > MAX_PATTERNS:
        raise fields.wrong("ignore", f"at most {MAX_PATTERNS:,} patterns")
    return Quantisation("modelopt", (0, 0), modules)


def _unsupported(fields: Fields, name: str) -> ValueError:
    return ValueError(
        f"{fields.where} with {name} {shown(fields.values.get(name))} is not supported: FP8 in blocks (quant_method "
        '"fp8", fmt "e4m3", activation_scheme "dynamic", weight_block_size [rows, columns]), "mxfp4" and "modelopt" '
        f"(quant_algo {', '.join(ALGORITHMS)}) are; dequantise its weights first"
    )


def _modules(fields: Fields, name: str) -> frozenset[str]:
    values = fields.values.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.wrong(name, "a list of names or null")
    if len(values) > MAX_MODULES:
        raise fields.wrong(name, f"at most {MAX_MODULES:,} names")
    return frozenset(values)

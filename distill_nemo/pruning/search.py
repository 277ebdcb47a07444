"""Candidates with a given number of parameters, among which the held-out loss decides."""

from collections.abc import Iterator
from itertools import product

from distill_nemo.config import PruneConfig
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.planning.gpus import find_gpu
from distill_nemo.pruning.sizes import TENSOR_CORES, Sizes, complete, evenly_spaced, given_sizes, sizes_of, smaller

# Fractions of its own size that an axis may keep. The width of MLP or experts then takes what parameters are left.
FRACTIONS = {
    "num_layers": (1, 0.875, 0.75, 0.625, 0.5),
    "hidden_size": (1, 0.875, 0.75, 0.625, 0.5),
    "num_query_groups": (1, 0.75, 0.5),
    "num_experts": (1, 0.75, 0.5),
}
LEAST_WIDTH = 0.35  # of the source's; narrower MLPs are not tried
LEAST_SHARE = 0.9  # of the target that a candidate has
MOST_CANDIDATES = 24  # to compare: those whose axes are cut most evenly
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}  # of a parameter; fp4 with a scale for every 16


def target_parameters(config: PruneConfig) -> int | None:
    """Return the largest number of parameters that the config allows; None if it states sizes alone."""
    if config.target_gpu is not None and config.target_memory is not None:
        return int(config.target_memory * find_gpu(config.target_gpu).memory_gb * 1e9 / BYTES[config.target_dtype])
    return None if config.target_params is None else int(config.target_params)


def candidates(model: Architecture, config: PruneConfig, most: int, tensor_ranks: int) -> list[Sizes]:
    """Return sizes with at most, and nearly, `most` parameters, those whose axes are cut most evenly first.

    Args:
        model: the source.
        config: the sizes that it states are not varied.
        most: number of parameters.
        tensor_ranks: tensor-parallel ranks, which widths and groups are multiples of.

    Raises:
        ValueError: if there are none, with the least and the most that there are.
    """
    own, total, given = sizes_of(model), num_parameters(model), given_sizes(config)
    require(most < total, f"the target of {most:,} parameters is not below the {total:,} of {model.name}")
    width = "ffn_hidden_size" if "ffn_hidden_size" in own else "moe_ffn_hidden_size"
    narrow = _multiple(LEAST_WIDTH * own[width], own[width], TENSOR_CORES * tensor_ranks)
    options = [complete(model, given | varied) for varied in _varied(model, given, tensor_ranks)]
    if width not in given:
        options = [_filled(model, sizes, width, most, TENSOR_CORES * tensor_ranks) for sizes in options]
    found = [sizes for sizes in options if LEAST_SHARE * most <= _parameters(model, sizes) <= most]
    found = [sizes for sizes in found if width in given or sizes[width] >= narrow]
    if not found:
        smallest = [sizes if width in given else sizes | {width: narrow} for sizes in options]
        least = min(_parameters(model, sizes) for sizes in smallest)
        raise ValueError(
            f"no cut of {model.name} ({total:,} parameters) has about {most:,}; with the axes that are free, {least:,} "
            "to all of them are tried. Raise the target, state fewer sizes, or cut twice, with distillation between"
        )
    return sorted(found, key=lambda sizes: _unevenness(sizes, own))[:MOST_CANDIDATES]


def _varied(model: Architecture, given: Sizes, tensor_ranks: int) -> Iterator[Sizes]:
    """Yield every combination of fractions of the axes that are not given."""
    own = sizes_of(model)
    units = {
        "num_layers": 1,
        "hidden_size": TENSOR_CORES,
        "num_query_groups": tensor_ranks,
        "num_experts": model.experts.num_groups if model.experts else 1,
    }
    fixed = {*given, *(["num_query_groups"] if "num_attention_heads" in given else [])}
    free = {
        name: sorted({_multiple(own[name] * part, own[name], units[name]) for part in parts})
        for name, parts in FRACTIONS.items()
        if name in own and name not in fixed
    }
    if "num_experts" in free and model.experts is not None:
        free["num_experts"] = [count for count in free["num_experts"] if count >= model.experts.num_experts_per_tok]
    for values in product(*free.values()):
        yield dict(zip(free, values, strict=True))


def _multiple(size: float, most: int, unit: int) -> int:
    """Return the closest multiple of `unit` below `most`, or `most`."""
    closest = max(round(size / unit), 1) * unit
    return min(closest, most)


def _filled(model: Architecture, sizes: Sizes, width: str, most: int, unit: int) -> Sizes:
    """Return the sizes with the largest width at which they have at most `most` parameters."""
    narrow, wide = unit, sizes[width]
    low, high = (_parameters(model, sizes | {width: each}) for each in (narrow, wide))
    if high <= most or wide <= narrow:
        return sizes
    fitting = narrow + int((most - low) * (wide - narrow) / (high - low))  # parameters grow linearly with it
    return sizes | {width: max(fitting // unit, 1) * unit}


def _parameters(model: Architecture, sizes: Sizes) -> int:
    return num_parameters(smaller(model, sizes, evenly_spaced(model, sizes)))


def _unevenness(sizes: Sizes, own: Sizes) -> float:
    """Return the difference between the largest and the smallest fraction that an axis keeps."""
    fractions = [sizes[name] / own[name] for name in own]
    return max(fractions) - min(fractions)

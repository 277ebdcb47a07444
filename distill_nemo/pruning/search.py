"""Candidates with a given number of parameters, among which the held-out loss decides."""

import math
from collections.abc import Iterator
from itertools import product

from distill_nemo.config import ParallelismConfig, PruneConfig
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.layouts import check_layout
from distill_nemo.planning.gpus import find_gpu
from distill_nemo.pruning.sizes import TENSOR_CORES, LayersOf, Sizes, complete, given_sizes, sizes_of, smaller

# Fractions of its own size that an axis may keep. The widths of MLPs and experts take what parameters are left.
FRACTIONS = {
    "num_layers": (1, 0.875, 0.75, 0.625, 0.5),
    "hidden_size": (1, 0.875, 0.75, 0.625, 0.5),
    "num_attention_heads": (1, 0.75, 0.5),  # of latent attention
    "num_query_groups": (1, 0.75, 0.5),
    "num_experts": (1, 0.75, 0.5),
}
WIDTHS = ("moe_ffn_hidden_size", "ffn_hidden_size")
LEAST_WIDTH = 0.35  # of the source's; narrower MLPs are not tried
LEAST_SHARE = 0.9  # of the target that a candidate has
MOST_CANDIDATES = 24  # to compare: those whose axes are cut most evenly
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}  # of a parameter; fp4 with a scale for every 16


def target_parameters(config: PruneConfig) -> int | None:
    """Return the largest number of parameters that the config allows; None if it states sizes alone."""
    if config.target_memory is not None:
        return int(config.target_memory * _parameters_in_memory(config))
    return None if config.target_params is None else int(config.target_params)


def _parameters_in_memory(config: PruneConfig) -> float:
    assert config.target_gpu is not None
    return find_gpu(config.target_gpu, "target_gpu").memory_gb * 1e9 / BYTES[config.target_dtype]


def as_target(config: PruneConfig, count: int, up: bool) -> str:
    """Return the target that allows `count` parameters, as the config states one; of memory rounded up or down."""
    if config.target_memory is None:
        return f"target_params={count}"
    parts = 10_000 * count / _parameters_in_memory(config)
    return f"target_memory={(math.ceil(parts) if up else math.floor(parts)) / 10_000} ({count:,} parameters)"


def candidates(
    model: Architecture, config: PruneConfig, parallelism: ParallelismConfig, layers_of: LayersOf
) -> list[Sizes]:
    """Return sizes with at most, and nearly, the target's parameters, those whose axes are cut most evenly first.

    Args:
        model: the source.
        config: has a target. The sizes that it states are not varied.
        parallelism: a layout that all candidates have. Widths are multiples of 64 times its tensor-parallel size.
        layers_of: returns the layers that stay, which may differ in size.

    Raises:
        ValueError: if there are none, with the targets that would do.
    """
    own, total, given, most = sizes_of(model), num_parameters(model), given_sizes(config), target_parameters(config)
    assert most is not None
    require(
        most < total,
        f"{as_target(config, most, True)} cuts nothing: {model.name} has {total:,} parameters. State less than "
        f"{as_target(config, total, False)}",
    )
    search = _Search(model, layers_of, most, TENSOR_CORES * parallelism.tensor_model_parallel_size)
    free = [name for name in WIDTHS if name in own and name not in given]
    options = [complete(model, given | varied) for varied in _varied(model, given, parallelism)]
    options = [sizes for sizes in options if search.has_layout(sizes, parallelism)]
    narrow = {name: _multiple(LEAST_WIDTH * own[name], own[name], search.unit) for name in free}
    filled = [search.filled(sizes, free) for sizes in options]
    filled = [sizes for sizes in filled if all(sizes[name] >= narrow[name] for name in free)]
    counts = [search.parameters(sizes) for sizes in filled]
    found = [sizes for sizes, count in zip(filled, counts, strict=True) if LEAST_SHARE * most <= count <= most]
    if not found:
        counts += [search.parameters(sizes | narrow) for sizes in options]
        _refuse(model, config, most, counts)
    return sorted(found, key=lambda sizes: _unevenness(sizes, own))[:MOST_CANDIDATES]


def _refuse(model: Architecture, config: PruneConfig, most: int, counts: list[int]) -> None:
    """Refuse a target that no candidate meets, with those next to it that some do."""
    require(bool(counts), f"no smaller {model.name} has this layout: set parallelism to fewer ranks, or state sizes")
    below = max((count for count in counts if count <= most), default=None)
    above = min((count for count in counts if most < count < num_parameters(model)), default=None)
    near = [as_target(config, count, True) for count in (below, above) if count is not None]
    raise ValueError(
        f"{as_target(config, most, True)}: no cut of {model.name} has about so few parameters, with the sizes that are "
        f"stated and {LEAST_WIDTH:.0%} of its width at least. The closest that there are: {' and '.join(near)}. State "
        "one of these, or fewer sizes beside it, or cut twice, with distillation between"
    )


class _Search:
    """Numbers of parameters of a model's cuts."""

    def __init__(self, model: Architecture, layers_of: LayersOf, most: int, unit: int) -> None:
        self.model, self.layers_of, self.most, self.unit = model, layers_of, most, unit

    def cut(self, sizes: Sizes) -> Architecture:
        """Return the architecture of these sizes."""
        return smaller(self.model, sizes, self.layers_of(sizes["num_layers"]))

    def parameters(self, sizes: Sizes) -> int:
        """Return the number of its parameters."""
        return num_parameters(self.cut(sizes))

    def has_layout(self, sizes: Sizes, parallelism: ParallelismConfig) -> bool:
        """Return True if the family can state the sizes, and the layout divides them."""
        try:
            check_layout(self.cut(sizes), parallelism)
        except ValueError:
            return False
        return True

    def filled(self, sizes: Sizes, widths: list[str]) -> Sizes:
        """Return the sizes with the largest widths, all cut alike, at which there are at most `most` parameters."""
        narrow = {name: min(self.unit, sizes[name]) for name in widths}
        low, high = self.parameters(sizes | narrow), self.parameters(sizes)
        if high <= self.most or low >= self.most:
            return sizes if high <= self.most else sizes | narrow
        share = (self.most - low) / (high - low)  # parameters grow linearly from all narrow to all wide
        fitting = {name: least + int(share * (sizes[name] - least)) for name, least in narrow.items()}
        return sizes | {name: max(fitting[name] // self.unit * self.unit, narrow[name]) for name in widths}


def _varied(model: Architecture, given: Sizes, parallelism: ParallelismConfig) -> Iterator[Sizes]:
    """Yield every combination of fractions of the axes that are not given."""
    own, tensor_ranks = sizes_of(model), parallelism.tensor_model_parallel_size
    of_router = model.experts.num_groups if model.experts else 1
    units = {
        "num_layers": 1,
        "hidden_size": TENSOR_CORES,
        "num_attention_heads": tensor_ranks,
        "num_query_groups": tensor_ranks,
        "num_experts": math.lcm(parallelism.expert_model_parallel_size, of_router),
    }
    fixed = {*given, *(["num_query_groups"] if "num_attention_heads" in given else [])}
    fixed |= {"num_attention_heads"} if "num_query_groups" in own else set()  # groups keep their heads
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


def _unevenness(sizes: Sizes, own: Sizes) -> float:
    """Return the difference between the largest and the smallest fraction that an axis keeps."""
    fractions = [sizes[name] / own[name] for name in own if name in FRACTIONS or name in WIDTHS]
    return max(fractions) - min(fractions)

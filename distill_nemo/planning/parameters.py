"""Number of parameters of a model, and of each rank of a layout. Tests compare them with models that are built."""

from collections import Counter
from math import prod
from typing import NamedTuple

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture, Layer, padded_vocab_size
from distill_nemo.models.families.pieces import EXPERT, EXPERT_BIAS, Place
from distill_nemo.models.families.tensors import table_of


class Count(NamedTuple):
    """Number of parameters. Those of experts are reduced and sharded over other ranks than the rest."""

    dense: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.dense + self.experts

    def plus(self, other: "Count") -> "Count":
        """Return the sum by kind."""
        return Count(self.dense + other.dense, self.experts + other.experts)

    def times(self, number: int) -> "Count":
        """Return the count of `number` equal parts."""
        return Count(self.dense * number, self.experts * number)


def total_parameters(model: Architecture) -> int:
    """Count the parameters of a whole model, tied embeddings once."""
    return rank_parameters(model, ParallelismConfig(), 0).total


def rank_parameters(model: Architecture, parallelism: ParallelismConfig, rank: int, output: bool = True) -> Count:
    """Count all chunks of pipeline rank `rank`, without the output layer if `output` is False."""
    count = Count()
    for stage in stages_of(parallelism, rank):
        count = count.plus(stage_parameters(model, parallelism, stage, output))
    return count


def stages_of(parallelism: ParallelismConfig, rank: int) -> range:
    """Return the stages of a pipeline rank, numbered in the order of the model."""
    return range(rank, parallelism.num_stages, parallelism.pipeline_model_parallel_size)


def layers_of_stage(model: Architecture, parallelism: ParallelismConfig, stage: int) -> tuple[Layer, ...]:
    """Return the layers of a stage."""
    sizes = parallelism.stage_sizes(model.num_layers)
    start = sum(sizes[:stage])
    return model.layers[start : start + sizes[stage]]


def rank_layers(model: Architecture, parallelism: ParallelismConfig, rank: int) -> list[Layer]:
    """Return the layers of all stages on a pipeline rank."""
    return [layer for stage in stages_of(parallelism, rank) for layer in layers_of_stage(model, parallelism, stage)]


def stage_parameters(model: Architecture, parallelism: ParallelismConfig, stage: int, output: bool = True) -> Count:
    """Count one stage on one tensor- and expert-parallel rank."""
    last = stage == parallelism.num_stages - 1
    table = padded_vocab_size(model.vocab_size) // parallelism.tensor_model_parallel_size * model.hidden_size
    count = Count()
    for layer, number in Counter(layers_of_stage(model, parallelism, stage)).items():
        count = count.plus(layer_parameters(model, layer, parallelism).times(number))
    if stage == 0:
        count = count.plus(Count(table))
    if last:
        shared = model.tie_word_embeddings and stage == 0  # on another stage, a tied output layer is a copy
        count = count.plus(Count(model.hidden_size + (table if output and not shared else 0)))
    return count


def layer_parameters(model: Architecture, layer: Layer, parallelism: ParallelismConfig) -> Count:
    """Count one layer on one tensor- and expert-parallel rank."""
    place = Place(model, layer, size=parallelism.tensor_model_parallel_size)
    dense = experts = 0
    for name, rule in table_of(model, layer).items():
        numbers = 0 if name == EXPERT_BIAS else sum(prod(piece.shape) for piece in rule(place))
        if name.startswith(EXPERT):
            assert model.experts is not None
            experts += numbers * (model.experts.num_experts // parallelism.expert_model_parallel_size)
        else:
            dense += numbers
    return Count(dense, experts)

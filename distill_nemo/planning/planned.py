"""A planned run: its config, architectures and number of ranks, from which memory and time follow."""

from dataclasses import dataclass, field, replace
from typing import Any

from distill_nemo.config import RunConfig
from distill_nemo.models.architecture import Architecture, Models
from distill_nemo.planning.parameters import Count, layer_parameters, rank_layers, rank_parameters, stages_of
from distill_nemo.teacher_store.manifest import Manifest


@dataclass(frozen=True)
class PlannedRun:
    """A run to plan.

    Args:
        config: the run, checked.
        models: its architectures.
        world_size: number of ranks.
        on_gpu: False for a CPU, as in tests.
        transformer_engine: True for Transformer Engine's layers, False for Megatron's local ones.
        stored: manifest of the store that it trains from, in place of a teacher; None: it trains from none.
    """

    config: RunConfig
    models: Models
    world_size: int
    on_gpu: bool = True
    transformer_engine: bool = True
    stored: Manifest | None = None
    _counts: dict[tuple[Any, ...], Count] = field(default_factory=dict, compare=False, repr=False)  # of its models

    @property
    def item(self) -> int:
        """Bytes of a weight or an activation."""
        bf16 = self.config.training.dtype == "bfloat16" or (self.config.training.dtype == "auto" and self.on_gpu)
        return 2 if bf16 else 4

    @property
    def data_parallel_size(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.config.parallelism.model_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Micro batches of a rank in a step."""
        return self.config.num_microbatches(self.data_parallel_size)

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch on a rank, where the sequence is not split over tensor-parallel ranks."""
        length = self.config.data.sequence_length // self.config.parallelism.context_parallel_size
        return self.config.training.micro_batch_size * length

    @property
    def split_tokens(self) -> int:
        """Tokens of a micro batch on a rank, between the layers' products, where sequence parallelism splits them."""
        par = self.config.parallelism
        return self.tokens // (par.tensor_model_parallel_size if par.sequence_parallel else 1)

    @property
    def fused(self) -> bool:
        """True if the output layers are part of the loss."""
        losses = self.config.distillation
        against_teacher = self.models.teacher is not None and losses.uses_logits and losses.fused_linear is not False
        return against_teacher or self.stored is not None

    @property
    def teacher_width(self) -> int:
        """Channels of the teacher's hidden states that the loss takes; 0 where it takes none."""
        if self.stored is not None:
            return self.stored.num if self.stored.codec == "hidden" else 0
        return self.models.teacher.hidden_size if self.models.teacher is not None else 0

    def shards(self, count: Count) -> float:
        """Return the parameters whose optimizer state a rank holds; the distributed optimizer shards it over copies."""
        if not self.config.optimizer.use_distributed_optimizer:
            return count.total
        par = self.config.parallelism
        copies = self.data_parallel_size * par.context_parallel_size
        experts = self.expert_parallel_size(self.models.student)
        return count.dense / copies + count.experts / (copies / experts)

    def expert_parallel_size(self, model: Architecture) -> int:
        """Return the number of ranks that share a model's experts; a dense model beside a MoE model is not split."""
        return 1 if model.experts is None else self.config.parallelism.expert_model_parallel_size

    def student(self, rank: int) -> Count:
        """Return the student's parameters on a pipeline rank."""
        return self._count(self.models.student, rank)

    def teacher(self, rank: int) -> Count:
        """Return the teacher's parameters on a pipeline rank."""
        if self.models.teacher is None:
            return Count()
        return self._count(self.models.teacher, rank, self.config.distillation.uses_logits)

    def _count(self, model: Architecture, rank: int, output: bool = True) -> Count:
        par = self.config.parallelism
        sizes = par.tensor_model_parallel_size, par.expert_model_parallel_size, par.pipeline_model_parallel_size
        key = (model is self.models.student, rank, output, *sizes, par.virtual_pipeline_model_parallel_size)
        if key not in self._counts:
            self._counts[key] = rank_parameters(model, par, rank, output)
        return self._counts[key]

    def in_host_memory(self, rank: int) -> int:
        """Return the number of the teacher's parameters that `offload_teacher` keeps in host memory: its layers'."""
        return sum(self._offloaded_layers(rank))

    def staged_layer(self, rank: int) -> int:
        """Return the parameters of the largest offloaded layer. A stage holds one, and two in its forward pass."""
        return max(self._offloaded_layers(rank), default=0)

    def _offloaded_layers(self, rank: int) -> list[int]:
        teacher, par = self.models.teacher, self.config.parallelism
        if teacher is None or not self.config.distillation.offload_teacher:
            return []
        return [layer_parameters(teacher, layer, par).total for layer in rank_layers(teacher, par, rank)]

    def is_first(self, rank: int) -> bool:
        """Return True if this pipeline rank holds the embedding."""
        return rank == 0

    def is_last(self, rank: int) -> bool:
        """Return True if this pipeline rank computes the loss."""
        return self.config.parallelism.num_stages - 1 in stages_of(self.config.parallelism, rank)

    def with_fields(self, **fields: Any) -> "PlannedRun":
        """Return the run with changed fields of the config, such as `training__recompute="full"`."""
        config = self.config
        for name, value in fields.items():
            section, field = name.split("__")
            config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
        return replace(self, config=config)

"""Compute one global batch of a distillation in Megatron at any layout; tests compare it with transformers in fp64.

The reference (`tests/distillation_reference.py`) shares nothing with the package except the weight files. Megatron's
gradients travel as a checkpoint: they take the place of the weights, are saved at the layout, and the exporter gives
them Hugging Face's names and shapes.
"""

import contextlib
import io
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_nemo.config import (
    DataConfig,
    DistillationConfig,
    ParallelismConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)

GLOBAL_BATCH, SEQUENCE, VOCAB = 8, 16, 507
NUM_STORED = 8  # draws, or ids, of a token
PROJECTION = "projection of hidden pair "
HELD_OUT = "held-out "


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and options that must not change the result of a batch."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    virtual: int | None = None
    context: int = 1
    micro_batch: int = 1
    distributed_optimizer: bool = False
    recompute: str | None = None
    fused_linear: bool | None = None

    def config(self) -> ParallelismConfig:
        return ParallelismConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            context_parallel_size=self.context,
            sequence_parallel=self.sequence_parallel,
            expert_model_parallel_size=self.expert,
        )


@dataclass
class Case:
    """Student, teacher and fields of `DistillationConfig`."""

    student: str
    teacher: str | None
    distillation: dict[str, Any] = field(default_factory=dict)
    masked: str = "some"  # some | first (every token of the first two samples) | all
    documents: tuple[int, ...] = ()  # lengths of the documents in a sample, if attention stays inside them
    codec: str = ""  # of the stored targets that take the place of a running teacher
    targets: str = ""  # their file, written by `distillation_reference.write_targets`

    @property
    def sequence(self) -> int:
        """Tokens of a sample."""
        return SEQUENCE

    @property
    def global_batch(self) -> int:
        """Number of samples."""
        return GLOBAL_BATCH

    @property
    def data(self) -> DataConfig:
        """The part of the config that models depend on; the batch does not come from files."""
        return DataConfig(sequence_length=SEQUENCE, reset_at_documents=bool(self.documents))

    def unpacked(self) -> "Case":
        """Return the case whose batch the oracle computes."""
        return self

    def batch(self) -> dict[str, torch.Tensor]:
        """Return the global batch: tokens, labels, loss_mask and position_ids, each [GLOBAL_BATCH, SEQUENCE].

        Later samples have fewer valid tokens, so that no two ranks have equally many.
        """
        generator = torch.Generator().manual_seed(5)
        text = torch.randint(VOCAB, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
        threshold = torch.linspace(0.1, 0.8, GLOBAL_BATCH)[:, None]
        mask = (torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) > threshold).float()
        mask[:2] *= self.masked != "first"
        mask *= self.masked != "all"
        positions = torch.arange(SEQUENCE).expand(GLOBAL_BATCH, -1)
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions}
        if self.documents:
            rows = [[first for first, stop in self.bounds(row) for _ in range(first, stop)] for row in range(len(text))]
            starts = torch.tensor(rows)
            batch |= {"document_starts": starts, "position_ids": positions - starts}
        return batch | {name: x for name, x in self.stored().items() if name.startswith("target_")}

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the stored targets, [GLOBAL_BATCH, SEQUENCE, ...], and with "hidden" the teacher's output `weight`."""
        from safetensors.torch import load_file

        return load_file(self.targets) if self.targets else {}

    def stored_teacher(self) -> Any:
        """Return the `StoredTeacher` of a run that learns from the stored targets."""
        from distill_nemo.models.distillation.stored_targets import StoredOutputLayer, StoredTeacher

        if not self.targets:
            return None
        layer = None
        if self.codec == "hidden":
            weight = self.stored()["weight"]
            layer = StoredOutputLayer(lambda start, stop: (weight[start:stop], None), weight.shape[1])
        return StoredTeacher(self.codec, self.distillation.get("temperature", 1.0), NUM_STORED, VOCAB, layer)  # pyright: ignore

    def bounds(self, sample: int) -> list[tuple[int, int]]:
        """Return start and stop of each document of a sample; every sample has them in another order."""
        turn = sample % max(len(self.documents), 1)
        lengths = self.documents[turn:] + self.documents[:turn] or (SEQUENCE,)
        assert sum(lengths) == SEQUENCE, lengths
        return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))

    def run_config(self, output: str, layout: Layout) -> RunConfig:
        teacher = TeacherConfig(checkpoint=self.teacher) if self.teacher and not self.codec else None
        kd, parallelism = DistillationConfig(**self.distillation), layout.config()
        kd.fused_linear = layout.fused_linear
        run = RunConfig(output, StudentConfig(checkpoint=self.student), teacher, kd, parallelism=parallelism)
        run.data = self.data
        run.training.micro_batch_size, run.training.global_batch_size = layout.micro_batch, self.global_batch
        run.training.recompute = layout.recompute
        run.optimizer.use_distributed_optimizer = layout.distributed_optimizer
        run.optimizer.warmup_steps, run.training.steps = 0, 2
        return run


def megatron_step(case: Case, layout: Layout, output: str) -> dict[str, Any]:
    """Run forward and backward of the global batch on this rank. Save the gradients as a checkpoint below `output`.

    Returns:
        The global token means of training and, prefixed with `HELD_OUT`, of an evaluation of the same batch; and the
        gradients of this rank's projections.
    """
    return megatron_steps([(case, layout, output)])[0]


def megatron_steps(cells: list[tuple[Case, Layout, str]]) -> list[dict[str, Any]]:
    """Run `megatron_step` for several cells with the same parallel sizes."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from distill_nemo.training.entry import resolve_models

    runs = [(case, *resolve_models(case.run_config(output, layout)), output) for case, layout, output in cells]
    with process_groups(runs[0][1].parallelism):
        return [_step(*cell) for cell in runs]


def _step(case: Case, run: RunConfig, models: Any, output: str) -> dict[str, Any]:
    from distill_nemo.checkpoint.save import CheckpointWriter
    from distill_nemo.checkpoint.state import _allocate_adam_state
    from distill_nemo.models.distillation.objective import objective_of
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.forward_step import forward_step
    from distill_nemo.training.setup import build_train_state

    seed_everything(0)
    train_state = build_train_state(run, models, torch.float32, load_weights=True, stored=case.stored_teacher())
    held_out = _evaluated(case, run, train_state)
    if case.distillation.get("balancer") == "dynamic":
        first = _evaluated(case, run, train_state, forward_step)
        for chunk in train_state.unwrapped:
            objective_of(chunk).balancer.observe(first)  # pyright: ignore
    means: dict[str, Any] = _forward_backward(case, run, train_state)
    means |= {HELD_OUT + name: value for name, value in held_out.items()}
    for name, parameter in [named for chunk in train_state.unwrapped for named in chunk.named_parameters()]:
        if parameter.requires_grad:
            gradient: Any = parameter.main_grad  # pyright: ignore
            assert gradient.isfinite().all(), name
            parameter.data.copy_(gradient)
            if name.startswith("_loss_modules."):
                means[PROJECTION + name.split(".")[1]] = gradient.clone()
    _allocate_adam_state(train_state.optimizer)  # no step was taken
    writer = CheckpointWriter(Path(output) / "checkpoints", run)
    writer.save(1, train_state.unwrapped, train_state.optimizer, train_state.scheduler, {"step": 1})
    return means


def _micro_batches(case: Case, run: RunConfig) -> list[dict[str, torch.Tensor]]:
    """Return this data-parallel rank's share."""
    from megatron.core import parallel_state as ps

    size = run.training.micro_batch_size
    share = case.global_batch // ps.get_data_parallel_world_size()
    first = ps.get_data_parallel_rank() * share
    batch = case.batch()
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(first, first + share, size)]


def _evaluated(case: Case, run: RunConfig, train_state: Any, step: Any = None) -> dict[str, float]:
    """Return token means of the global batch, from training's evaluation or from a training step without gradients."""
    from distill_nemo.evaluation import evaluate

    micro = _micro_batches(case, run)
    streams = [iter(micro) for _ in train_state.chunks]
    sizes = {"sequence_length": case.sequence, "micro_batch_size": run.training.micro_batch_size}
    return evaluate(train_state.chunks, streams, num_microbatches=len(micro), step=step, **sizes)


def _forward_backward(case: Case, run: RunConfig, train_state: Any) -> dict[str, float]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from distill_nemo.evaluation import reduce_reports
    from distill_nemo.training.forward_step import forward_step

    for chunk in train_state.chunks:
        chunk.train()
    micro = _micro_batches(case, run)
    streams = [iter(micro) for _ in train_state.chunks]
    reports: Any = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=streams if len(streams) > 1 else streams[0],
        model=train_state.chunks, num_microbatches=len(micro), seq_length=case.sequence,
        micro_batch_size=run.training.micro_batch_size, forward_only=False,
    )  # fmt: skip
    if run.optimizer.use_distributed_optimizer:  # each rank has reduced a slice only
        for chunk in train_state.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                _gather_slices(buffer)
    return reduce_reports(reports, train_state.chunks)


def _gather_slices(buffer: Any) -> None:
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        slices = bucket.grad_data.chunk(dist.get_world_size(group))
        dist.all_gather(list(slices), slices[dist.get_rank(group)].clone(), group=group)


def gradients(output: str) -> dict[str, torch.Tensor]:
    """Return the gradients that `megatron_step` saved, by transformers' parameter names. Needs one process."""
    from safetensors.torch import load_file

    from distill_nemo.checkpoint.export import export
    from distill_nemo.config import ExportConfig

    with contextlib.redirect_stdout(io.StringIO()):
        export(ExportConfig(output, f"{output}/hf"))
    return load_file(f"{output}/hf/model.safetensors")


def gradients_of(outputs: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return `gradients` of several cells."""
    return [gradients(output) for output in outputs]


def worst_errors(
    ranks: list[dict[str, Any]],
    got: dict[str, torch.Tensor],
    expected: tuple[dict[str, float], dict[str, torch.Tensor]],
) -> tuple[float, float]:
    """Return the worst errors (of metrics over ranks, relative; of gradients, relative to their largest entry)."""
    means, wanted = expected
    metric = max(abs(rank[name] - value) / max(abs(value), 1e-12) for rank in ranks for name, value in means.items())
    found = dict(got)
    for rank in ranks:
        found |= {name: value for name, value in rank.items() if name.startswith(PROJECTION)}
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    errors = {n: (found[n].double() - w).abs().max() / w.abs().max().clamp(min=1e-30) for n, w in wanted.items()}
    return metric, float(max(errors.values()))

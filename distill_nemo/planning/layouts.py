"""Choice of a parallel layout for a number of GPUs: of those that are exact and fit, the one with the fastest step."""

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from distill_nemo.checks import check
from distill_nemo.config import ParallelismConfig, TrainingConfig
from distill_nemo.models.checkpoints.exportable import check_exportable
from distill_nemo.models.layouts import check_layout, check_transformer_engine
from distill_nemo.planning.communication import moving_seconds
from distill_nemo.planning.compute import Work, rank_works, time_of_work
from distill_nemo.planning.gpus import NODE, UTILISATION, Gpu
from distill_nemo.planning.memory import fullest, permanent
from distill_nemo.planning.parameters import total_parameters
from distill_nemo.planning.planned import PlannedRun
from distill_nemo.planning.report import GB, layout_text

MICRO_BATCH_TOKENS = 32768  # up to which micro batches are tried
RECOMPUTE: tuple[Literal["full"] | None, ...] = (None, "full")
CONTEXT_TOKENS = 2048  # of a sequence that a context-parallel rank has at least
SHARE = 0.95  # of a GPU's memory that a choice may fill; the rest is left to what a plan does not count
MAX_GPUS = 4096  # up to which `_least` looks
CHOSEN = {  # fields of `parallelism` and `training` that a choice sets
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "sequence_parallel", "micro_batch_size", "recompute"),
}


@dataclass(frozen=True)
class Candidate:
    """A run at a layout, and the estimated seconds of a step: all, and those spent moving data."""

    planned: PlannedRun
    seconds: float
    moving: float

    def __str__(self) -> str:
        train, par = self.planned.config.training, self.planned.config.parallelism
        layout = layout_text(par, self.planned.data_parallel_size)
        batch = f"micro batch {train.micro_batch_size}, recompute {train.recompute or 'none'}"
        return f"{layout}; {batch}: {fullest(self.planned).total / GB:.1f} GB a GPU, {self.seconds:.2f} s a step"


@dataclass(frozen=True)
class Choice:
    """The chosen run, and the reasons in a few lines."""

    planned: PlannedRun
    why: str


def choose_layout(planned: PlannedRun, gpu: Gpu, fixed: Collection[str] = ()) -> Choice:
    """Return the fastest layout of `planned.world_size` GPUs that a run accepts and that fits.

    Tensor parallelism stays within a node. Virtual pipelines are not tried.

    Args:
        planned: the run, on GPUs. The fields in `CHOSEN` are chosen, whatever their values.
        gpu: model of the GPUs.
        fixed: fields of `CHOSEN` that keep their values.

    Raises:
        ValueError: if none fits, with the least number of GPUs for which one does; and from `checks.check` and
            `check_exportable`.
    """
    alone = replace(planned.config.training, micro_batch_size=1)
    check(replace(planned.config, parallelism=ParallelismConfig(), training=alone), 1)  # mistakes that no layout mends
    if planned.config.checkpoint.export:
        check_exportable(planned.models.student, planned.config.checkpoint.quantized)
    ranked = _ranked(planned, gpu, fixed)
    fitting = _fitting(ranked, gpu)
    best = next(fitting, None)
    if best is None:
        raise ValueError(_refusal(planned, gpu, fixed, allowed=bool(ranked)))
    lines = [str(best) + f", of which {best.moving:.2f} move data"]
    faster = ranked[: ranked.index(best)]
    if faster:
        room = f"{SHARE:.0%} of {gpu.memory_gb:g} GB"
        lines.append(f"{len(faster)} faster settings take more than {room}, such as {faster[-1]}")
    other = next((c for c in fitting if c.planned.config.parallelism != best.planned.config.parallelism), None)
    if other is not None:
        lines.append(f"the next layout that fits: {other}")
    return Choice(best.planned, "\n".join(lines))


def _ranked(planned: PlannedRun, gpu: Gpu, fixed: Collection[str]) -> list[Candidate]:
    """Return all that a run accepts, the fastest first. Of equally fast ones, the simplest is first."""
    works: dict[tuple[int, str | None], list[Work]] = {}
    found = []
    for run in _accepted(planned, fixed):
        key = run.config.parallelism.pipeline_model_parallel_size, run.config.training.recompute
        if key not in works:
            works[key] = rank_works(run)
        moving = moving_seconds(run, gpu)
        seconds = time_of_work(run, works[key], gpu.bf16_tflops, UTILISATION).step + moving
        found.append(Candidate(run, seconds, moving))
    return sorted(found, key=lambda each: (each.seconds, each.planned.config.parallelism.model_parallel_size))


def _accepted(planned: PlannedRun, fixed: Collection[str]) -> Iterator[PlannedRun]:
    config, saved = planned.config, planned.config.checkpoint

    @functools.cache
    def exports(tensor: int) -> bool:
        own = ParallelismConfig(tensor_model_parallel_size=tensor)
        return not saved.export or _passes(check_exportable, planned.models.student, saved.quantized, own)

    for parallelism in _layouts(planned):
        if _changes(config.parallelism, parallelism, fixed) or not _exact(planned, parallelism):
            continue
        if not exports(parallelism.tensor_model_parallel_size):
            continue
        for training in _trainings(planned, fixed):
            changed = replace(config, parallelism=parallelism, training=training)
            if _passes(check, changed, planned.world_size):
                yield replace(planned, config=changed)


def _trainings(planned: PlannedRun, fixed: Collection[str]) -> Iterator[TrainingConfig]:
    """Yield micro batch sizes without and with recomputation. `selective` is not tried: it saves little."""
    given, size = planned.config.training, 1
    while size == 1 or size * planned.config.data.sequence_length <= MICRO_BATCH_TOKENS:
        for recompute in RECOMPUTE:
            training = replace(given, micro_batch_size=size, recompute=recompute)
            if not _changes(given, training, fixed):
                yield training
        size *= 2


def _layouts(planned: PlannedRun) -> Iterator[ParallelismConfig]:
    """Yield the sizes that divide the ranks."""
    timeout, world = planned.config.parallelism.timeout_minutes, planned.world_size
    models = [model for model in planned.models if model is not None]
    longest = max(planned.config.data.sequence_length // CONTEXT_TOKENS, 1)
    experts = max((model.experts.num_experts for model in models if model.experts), default=1)
    for tensor in _divisors(world, NODE):
        for pipeline in _divisors(world // tensor, min(model.num_layers for model in models)):
            peers = world // (tensor * pipeline)
            for context in _divisors(peers, min(longest, NODE)):
                for expert in _divisors(peers, experts):
                    yield ParallelismConfig(
                        tensor, pipeline, None, context, expert, sequence_parallel=tensor > 1, timeout_minutes=timeout
                    )


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _changes(given: object, other: object, fixed: Collection[str]) -> bool:
    return any(vars(given)[name] != vars(other)[name] for name in fixed if name in vars(given))


def _exact(planned: PlannedRun, parallelism: ParallelismConfig) -> bool:
    models = [model for model in planned.models if model is not None]
    return all(
        _passes(check_layout, model, parallelism) and _passes(check_transformer_engine, model, parallelism)
        for model in models
    )


def _passes[**P](checked: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
    try:
        checked(*args, **kwargs)
    except ValueError:
        return False
    return True


def _fitting(ranked: list[Candidate], gpu: Gpu) -> Iterator[Candidate]:
    """Yield those whose fullest rank fits."""
    room = SHARE * gpu.memory_gb * GB
    too_large: dict[int, bool] = {}  # by id of the layout: weights and optimizer alone
    for each in ranked:
        par = each.planned.config.parallelism
        if id(par) not in too_large:
            ranks = range(par.pipeline_model_parallel_size)
            too_large[id(par)] = any(sum(permanent(each.planned, rank).values()) > room for rank in ranks)
        if not too_large[id(par)] and fullest(each.planned).total <= room:
            yield each


def _refusal(planned: PlannedRun, gpu: Gpu, fixed: Collection[str], allowed: bool) -> str:
    batch, size, saved = planned.config.training.global_batch_size, planned.world_size, planned.config.checkpoint
    if not allowed:
        rounded = saved.export and planned.models.student.quantization is not None
        writes = f', and can write checkpoint.quantized = "{saved.quantized}"' if rounded else ""
        return (
            f"gpus = {size}: no layout divides both models and training.global_batch_size = {batch}{writes}; choose "
            "another number, such as a power of two"
        )
    least = _least(planned, gpu, fixed)
    would = f"the least that would do: {least} x {gpu.name}" if least else f"not even {MAX_GPUS} would do"
    return f"no layout of {size} x {gpu.name} fits {SHARE:.0%} of {gpu.memory_gb:g} GB; {would}"


def _least(planned: PlannedRun, gpu: Gpu, fixed: Collection[str]) -> int | None:
    """Return the least number of GPUs that would do: a power of two, or whole nodes."""
    student, teacher = planned.models
    numbers = 18 * total_parameters(student) + (2 * total_parameters(teacher) if teacher else 0)  # bytes on all ranks
    size = 1
    while size <= MAX_GPUS:
        if size * SHARE * gpu.memory_gb * GB >= numbers:
            ranked = _ranked(replace(planned, world_size=size), gpu, fixed)
            if next(_fitting(ranked, gpu), None) is not None:
                return size
        size += size if size < NODE else NODE * max(size // (8 * NODE), 1)
    return None

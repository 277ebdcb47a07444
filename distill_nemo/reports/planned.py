"""A plan beside what was measured: memory and time of a step."""

import statistics
from dataclasses import replace
from typing import Any

from distill_nemo.checks import check
from distill_nemo.config import ModelConfig
from distill_nemo.planning.gpus import GPUS, UTILISATION, Gpu
from distill_nemo.reports.comparison import MISSING, percent
from distill_nemo.reports.runs import SHOWN, RecordedRun
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.runtime.metrics_file import finite

SKIPPED = 5  # first steps, which compile and allocate


def plans_of(runs: list[RecordedRun]) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """Return rows of plans by name of their run, and notes on the runs that cannot be planned."""
    plans, notes = {}, {run.name: list[str]() for run in runs}
    for run in runs:
        if run.lines:
            try:
                plans[run.name] = plan_against_truth(run)
            except ValueError as error:
                notes[run.name].append(f"no plan: {str(error)[:SHOWN]}")
    return plans, notes


def plan_against_truth(run: RecordedRun) -> dict[str, str]:
    """Return the cells of the run's row: memory and seconds of a step, planned and measured; TFLOP/s and utilisation.

    Raises:
        ValueError: if the run's config cannot be planned.
    """
    with megatron_imports():
        from distill_nemo.checkpoint.hub_models import described
        from distill_nemo.planning.compute import all_work, time_of
        from distill_nemo.planning.memory import fullest
        from distill_nemo.planning.planned import PlannedRun
        from distill_nemo.training.entry import resolve_models

    start = next(reversed(run.of_kind("start")), {})
    world, device = finite(start.get("world_size")), str(start.get("device", ""))
    if run.config is None or not 1 <= world <= 1e6:
        raise ValueError("its ranks are not recorded" if run.config else "no config.yaml")
    data = replace(run.config.data, train=["any"], valid=[])
    config = replace(run.config, data=data, student=_from_fields(run.config.student))
    if config.teacher is not None:
        config.teacher = _from_fields(config.teacher)
    config, models = resolve_models(described(config))
    check(config, int(world))
    on_gpu = device != "cpu"
    fused_layers = on_gpu and models.student.quantization is None
    planned = PlannedRun(config, models, int(world), on_gpu=on_gpu, transformer_engine=fused_layers)
    gpu = _gpu(device)
    seconds, tokens = _seconds(run), config.training.global_batch_size * config.data.sequence_length
    reached = all_work(planned).total * tokens / seconds / world / 1e12 if seconds else None
    measured = [finite(line.get("peak_memory")) for line in run.of_kind("end")]
    peak = max((size for size in measured if size > 0), default=None)
    return {
        "memory, GB, planned": f"{fullest(planned).total / 1e9:.2f}",
        "memory, GB, measured": f"{peak / 1e9:.2f}" if peak else MISSING,
        "step, s, planned": f"{time_of(planned, gpu.bf16_tflops, UTILISATION).step:.3f}" if gpu else MISSING,
        "step, s, measured": f"{seconds:.3f}" if seconds else MISSING,
        "TFLOP/s per rank": f"{reached:.3g}" if reached else MISSING,
        "utilisation": percent(reached / gpu.bf16_tflops) if reached and gpu else MISSING,
    }


def _from_fields[T: ModelConfig](model: T) -> T:
    """Return a model without its checkpoint: a run's config has every field, and the directory may be elsewhere now."""
    return replace(model, checkpoint=None)


def _seconds(run: RecordedRun) -> float | None:
    steps: list[dict[str, Any]] = run.of_kind("train")
    seconds = [s for line in steps[SKIPPED:] or steps if (s := finite(line.get("seconds"))) > 0]
    return statistics.median(seconds) if seconds else None


def _gpu(device: str) -> Gpu | None:
    """Return the GPU that CUDA's name of a device stands for."""
    return next((gpu for name, gpu in GPUS.items() if name.partition("-")[0].upper() in device.upper()), None)

"""A tiny run on real text (token files, teacher, config), and the functions to run one in a test."""

import json
from pathlib import Path
from typing import Any

from distill_nemo.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from tests.tiny_models import write_hf


def write_inputs(root: Path) -> None:
    """Write tokenizer, train and valid token files of some standard library modules, teacher and student, below `root`.

    The student comes from a file because random initial weights differ between layouts.
    """
    from distill_nemo.data.prepare import prepare
    from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer

    modules = stdlib_modules()[:12]
    train_tokenizer(modules, root / "tokenizer", 507)
    prepare([str(m) for m in modules[2:]], str(root / "train"), str(root / "tokenizer"), num_workers=1, progress=False)
    prepare([str(m) for m in modules[:2]], str(root / "valid"), str(root / "tokenizer"), num_workers=1, progress=False)
    write_hf(root / "teacher", "llama")
    write_hf(root / "student", "llama", seed=2, layers=2, width=32)


def tiny_run(inputs: Path, output: Path, **training) -> RunConfig:
    """Return a run of eight steps, of a two-layer student with the four-layer teacher."""
    student = StudentConfig(checkpoint=str(inputs / "student"))
    run = RunConfig(str(output), student, TeacherConfig(checkpoint=str(inputs / "teacher")))
    run.data = DataConfig([str(inputs / "train")], [str(inputs / "valid")], tokenizer=str(inputs / "tokenizer"))
    run.data.sequence_length = 32
    settings = {"steps": 8, "micro_batch_size": 2, "global_batch_size": 4, "eval_interval": 4, "eval_batches": 1}
    run.training = TrainingConfig(**{**settings, "dtype": "float32", **training})
    run.optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    run.checkpoint = CheckpointConfig(save_interval=4, export=False)
    run.logging = LoggingConfig(log_interval=1, tensorboard=False)
    return run


TIMINGS = ("seconds", "tokens_per_second", "data_seconds", "save_seconds")


def metrics(output: Path) -> list[dict]:
    """Return `metrics.jsonl` without times, and without starts and ends of processes."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in ("start", "end")]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in kept]


def write_deep_models(root: Path, layers: int = 8) -> None:
    """Write `student`, `teacher` and, with experts, `moe_student`, `moe_teacher`, deep enough for 8 stages."""
    shape = {"layers": layers, "heads": 4, "groups": 4}
    write_hf(root / "teacher", "llama", width=64, **shape)
    write_hf(root / "student", "llama", seed=2, width=32, **shape)
    write_hf(root / "moe_teacher", "qwen3_moe", seed=3, width=64, layers=2, heads=4, groups=4)
    write_hf(root / "moe_student", "qwen3_moe", seed=4, width=32, layers=2, heads=4, groups=4)


def changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return `run` with `{"section.field": value}` set."""
    for path, value in changes.items():
        section, field = path.split(".")
        assert hasattr(getattr(run, section), field), path
        setattr(getattr(run, section), field, value)
    return run


def differences(lines: list[dict], expected: list[dict]) -> dict[str, float]:
    """Return the worst relative difference of every metric of two runs, which must have the same lines and metrics."""
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in expected]
    worst: dict[str, float] = {}
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"kind"}:
            apart = abs(line[name] - other[name]) / max(abs(line[name]), abs(other[name]), 1e-30)
            worst[name] = max(worst.get(name, 0.0), apart)
    return worst

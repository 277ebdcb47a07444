"""Defaults that every recipe starts from."""

import nemo_run as run

from distill_nemo.config import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelismConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.training.entry import distill


def base(name: str) -> run.Partial:
    """A complete recipe with every default, to be changed where a run differs."""
    return run.Partial(
        distill,
        output_dir=f"runs/{name}",
        student=run.Config(StudentConfig),
        teacher=run.Config(TeacherConfig),
        distillation=run.Config(DistillationConfig),
        parallelism=run.Config(ParallelismConfig),
        data=run.Config(DataConfig),
        optimizer=run.Config(OptimizerConfig),
        training=run.Config(TrainingConfig),
        checkpoint=run.Config(CheckpointConfig),
        logging=run.Config(LoggingConfig),
    )

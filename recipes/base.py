"""Defaults that every recipe starts from."""

from typing import Any

import nemo_run as run

from distill_nemo.config_files import sections
from distill_nemo.training.entry import distill


def base(name: str) -> run.Partial:
    """Return a complete recipe with every default, which other recipes change."""
    parts: dict[str, Any] = {section: run.Config(cls) for section, cls in sections().items()}
    return run.Partial(distill, output_dir=f"runs/{name}", **parts)


def pair(name: str, teacher: str | None, student: str | None, **parallelism: int) -> run.Partial:
    """Return a recipe for two local Hugging Face directories: 2.6 billion tokens, sequence parallel."""
    recipe = base(name)
    recipe.teacher.checkpoint = teacher
    recipe.student.checkpoint = student
    for size, value in parallelism.items():
        setattr(recipe.parallelism, size, value)
    recipe.parallelism.sequence_parallel = parallelism.get("tensor_model_parallel_size", 1) > 1
    recipe.optimizer.warmup_steps = 100
    recipe.training.steps = 5000
    return recipe

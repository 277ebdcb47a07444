"""Defaults that every recipe starts from."""

from typing import Any

import nemo_run as run

from distill_nemo.cli.compress import compress
from distill_nemo.config_files import sections
from distill_nemo.pruning.stages import CompressConfig
from distill_nemo.training.entry import distill


def base(name: str) -> run.Partial:
    """Return a recipe with every field at its default, for other recipes to change."""
    parts: dict[str, Any] = {section: run.Config(cls) for section, cls in sections().items()}
    return run.Partial(distill, output_dir=f"runs/{name}", **parts)


def of_checkpoints(name: str, teacher: str | None, student: str | None) -> run.Partial:
    """Return a recipe for two checkpoints, without a layout: 5,000 steps, 2.6 billion tokens."""
    recipe = base(name)
    recipe.teacher.checkpoint = teacher
    recipe.student.checkpoint = student
    recipe.optimizer.warmup_steps = 100
    recipe.training.steps = 5000
    return recipe


def pruned(name: str, teacher: str | None, **cut: float) -> run.Partial:
    """Return a recipe of `compress` for a local Hugging Face directory; `cut` has fields of `CutConfig`.

    The distillation is that of NVIDIA's Mistral-NeMo-Minitron-8B (arXiv:2408.11796): 60 steps of warm-up to a learning
    rate of 1e-4, then a cosine down to 4.5e-7. The loss is the forward KL of the logits alone at temperature 1, best
    of those compared where most layers stay (arXiv:2407.14679). 2.6 billion tokens; NVIDIA's run took 380 billion.
    """
    parts: dict[str, Any] = {section: run.Config(cls) for section, cls in sections(CompressConfig).items()}
    recipe = run.Partial(compress, teacher=teacher, output=f"runs/{name}", **cut, **parts)
    recipe.optimizer.lr, recipe.optimizer.min_lr = 1e-4, 4.5e-7
    recipe.optimizer.warmup_steps = 60
    recipe.distillation.divergence = "forward_kl"
    recipe.distillation.logits_weight = 1.0
    recipe.training.steps = 5000
    return recipe

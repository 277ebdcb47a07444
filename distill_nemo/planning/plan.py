"""Print the plan of a recipe's config, for `nemo distill plan`. Builds no model and needs no GPU."""

from collections.abc import Collection
from dataclasses import replace

from distill_nemo.checkpoint.hub_models import described
from distill_nemo.config import ParallelismConfig, RunConfig
from distill_nemo.models.architecture import Models
from distill_nemo.planning.advice import check_setting, what_would_fit
from distill_nemo.planning.gpus import Gpu, check_utilisation
from distill_nemo.planning.layouts import choose_layout
from distill_nemo.planning.memory import fullest
from distill_nemo.planning.planned import PlannedRun
from distill_nemo.planning.report import GB, report
from distill_nemo.training.entry import resolve_models
from distill_nemo.training.stores import check_stores


def print_plan(
    name: str, config: RunConfig, world_size: int, gpu: Gpu, utilisation: float, transformer_engine: bool
) -> None:
    """Print what a run needs.

    Args:
        name: name of the recipe.
        config: config of the run, from the recipe.
        world_size: number of ranks, with one GPU each.
        gpu: model of the GPUs.
        utilisation: share of the GPU's peak that is reached, above 0 and at most 1.
        transformer_engine: True if its layers are used.

    Raises:
        ValueError: for a config that a run would refuse; after printing, if it does not fit, with changes that would.
    """
    check_utilisation(utilisation)
    planned = planned_run(config, world_size, transformer_engine)
    print(report(name, planned, gpu, utilisation))
    too_much = fullest(planned).total / GB - gpu.memory_gb
    if too_much > 0:
        fitting = what_would_fit(planned, gpu.memory_gb * GB)
        advice = f"what would fit: {' | '.join(fitting)}" if fitting else "take more ranks or GPUs with more memory"
        raise ValueError(f"does not fit: {too_much:.1f} GB too much on a {gpu.name} of {gpu.memory_gb:g} GB; {advice}")


def planned_run(config: RunConfig, world_size: int, transformer_engine: bool = True) -> PlannedRun:
    """Return a run on GPUs, planned.

    Raises:
        ValueError: for a config that a run would refuse.
    """
    config, models = _resolved(config)
    stored = check_stores(config, models.student.vocab_size)
    local = not transformer_engine or models.student.quantization is not None
    planned = PlannedRun(config, models, world_size, transformer_engine=not local, stored=stored)
    check_setting(planned)
    return planned


def with_layout(config: RunConfig, gpus: int, gpu: Gpu, fixed: Collection[str] = ()) -> tuple[RunConfig, str]:
    """Return the config at the layout that `choose_layout` finds for `gpus` GPUs, and the reasons.

    Raises:
        ValueError: from `choose_layout` and `resolve_models`.
    """
    resolved, models = _resolved(replace(config, parallelism=ParallelismConfig()))
    resolved = replace(resolved, parallelism=config.parallelism)
    stored = check_stores(resolved, models.student.vocab_size)
    planned = PlannedRun(resolved, models, gpus, transformer_engine=models.student.quantization is None, stored=stored)
    choice = choose_layout(planned, gpu, fixed)
    chosen = choice.planned.config
    return replace(config, parallelism=chosen.parallelism, training=chosen.training), choice.why


def _resolved(config: RunConfig) -> tuple[RunConfig, Models]:
    try:
        return resolve_models(described(config))
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise ValueError(
            f"{error}. A plan reads its config.json only: copy that, or set checkpoint=None and num_layers, "
            "hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, vocab_size"
        ) from None

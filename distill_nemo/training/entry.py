"""`distill`, the function that a recipe configures and an executor runs on every rank.

Light at import, because the launcher reads the recipe's fields from it.
"""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_nemo.checks import check
from distill_nemo.config import ParallelismConfig, RunConfig
from distill_nemo.config_files import from_dict, load_yaml, save_yaml, to_dict
from distill_nemo.fields import require, takes_fields_of
from distill_nemo.runtime.errors import errors_in_one_screen, errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.models.architecture import Architecture, Models


IMPORTED = (
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "distill_nemo.checkpoint.export",
    "distill_nemo.models.source_check",
    "distill_nemo.training.calibration",
    "distill_nemo.training.data",
    "distill_nemo.training.loop",
    "distill_nemo.training.setup",
    "distill_nemo.training.stores",
)


@takes_fields_of(RunConfig)
def distill(**sections: Any) -> None:
    r"""Train a student, with a teacher to imitate or without one, and export it to Hugging Face format.

    Example:
        nemo distill train llama32_3b_to_1b \
            teacher.checkpoint=/models/Llama-3.2-3B student.checkpoint=/models/Llama-3.2-1B \
            data.train='["data/corpus"]' distillation.temperature=2.0 run.executor=local run.executor.processes=8

    Args:
        **sections: the fields of `RunConfig`; None stands for a field's default.

    Raises:
        ValueError: for a config that cannot run, before anything is written.
    """
    config = RunConfig(**{name: value for name, value in sections.items() if value is not None})
    with errors_of_a_rank():
        run_config(config)


def run_config(config: RunConfig) -> None:
    """Run a config on this rank. If a signal stops the run, exit with 128 + its number."""
    from distill_nemo.runtime.orphans import end_with_torchrun
    from distill_nemo.runtime.signals import keep_early_sigurg

    keep_early_sigurg()
    end_with_torchrun()
    from distill_nemo.runtime.process_groups import is_joined, process_groups, raise_everywhere, rank, world_size

    config = from_dict(to_dict(config))  # a copy, with checked types
    check(config, world_size())
    from distill_nemo.checkpoint.hub_models import on_this_machine

    config = on_this_machine(config)
    import_modules()
    config, models = resolve_models(config)
    check(config, world_size())
    require(
        config.teacher is None or config.teacher.checkpoint is not None,
        "teacher.checkpoint is not set: a teacher of random weights teaches nothing; name one, or set teacher=None",
    )
    from distill_nemo.models.source_check import refusal_of_sources

    refusal = refusal_of_sources(*models) if rank() == 0 or is_joined() else None
    with process_groups(config.parallelism):
        raise_everywhere(refusal)
        stopped = _train(config, models)
        if stopped and rank() == 0:  # at once: when another rank ends first, torchrun ends this one
            print(f"stopped by signal {stopped}; checkpoint written; the same command resumes", flush=True)
    if stopped:
        sys.exit(128 + stopped)


def import_modules() -> None:
    """Set up the device, and import what a run needs, eight seconds' worth. Repetitions cost nothing."""
    with megatron_imports():
        for module in IMPORTED:
            importlib.import_module(module)


def resolve_models(config: RunConfig) -> "tuple[RunConfig, Models]":
    """Return the architectures of both models, and the config with their unset fields filled in from them.

    Raises:
        ValueError: from `resolve_pair`, `quantized_as`, `check_layout` and `locate_pairs`, and if a sequence is longer
            than a model's positions.
    """
    from distill_nemo.data.token_files import documents_apart
    from distill_nemo.models.hidden_layers import locate_pairs
    from distill_nemo.models.resolve import quantized_as, resolve_pair

    models = resolve_pair(config.student, config.teacher)
    models = models._replace(student=quantized_as(models.student, config.quantization))
    setting = config.data.sequence_length, documents_apart(config.data), config.parallelism
    roles = zip(models._fields, models, strict=True)
    student, teacher = (model and fitted(role, model, *setting) for role, model in roles)
    if models.teacher is not None:
        sizes = (config.parallelism.stage_sizes(model.num_layers) for model in (models.student, models.teacher))
        locate_pairs(config.distillation.hidden_layers, *sizes)
    quantization = models.student.quantization or config.quantization
    config = replace(config, student=models.student.filled(config.student), quantization=quantization)
    if config.teacher is not None and models.teacher is not None:
        config.teacher = models.teacher.filled(config.teacher)
    return config, models._replace(student=student, teacher=teacher)


def fitted(
    role: str, model: "Architecture", length: int, documents_apart: bool, parallelism: ParallelismConfig
) -> "Architecture":
    """Return a model as it runs on sequences of a length.

    Raises:
        ValueError: from `check_layout`, and if a sequence is longer than the model's positions.
    """
    from distill_nemo.models.layouts import check_layout

    check_length(length, role, model, "data.sequence_length")
    check_layout(model, parallelism)
    model = model.at_length(length)
    return model.with_documents_apart() if documents_apart else model


def check_length(length: int, role: str, model: "Architecture", field: str) -> None:
    """Refuse sequences beyond a model's positions, or beyond where its rotary embeddings change.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    if length > model.max_position_embeddings:
        raise ValueError(
            f"{field} = {length} is longer than the {role}'s max_position_embeddings = {model.max_position_embeddings}"
        )
    if length > model.longest_sequence:
        raise ValueError(
            f"{field} = {length} is longer than the {role}'s original_max_position_embeddings = "
            f"{model.longest_sequence}: beyond it, transformers rotates by other frequencies (long_factor), which are "
            f"not supported; set {field} to at most {model.longest_sequence}"
        )


def _train(config: RunConfig, models: "Models") -> int | None:
    from distill_nemo.checkpoint.directory import check_output_dir
    from distill_nemo.runtime.output_lock import locked_by_rank_0

    check_output_dir(config.output_dir)
    with locked_by_rank_0(Path(config.output_dir) / "run.lock", f"output_dir = {config.output_dir}"):
        stopped, chunks = _train_alone(config, models)
        if stopped is None and config.checkpoint.export:
            from distill_nemo.checkpoint.export import export_from_run

            export_from_run(config, models.student, chunks)
        return stopped


def _train_alone(config: RunConfig, models: "Models") -> "tuple[int | None, list[GPTModel]]":
    """Return the signal that stopped the run, if any, and this rank's stages of the student."""
    import torch

    from distill_nemo.checkpoint.directory import changes, check_resumable, checkpoint_root, read_record
    from distill_nemo.checkpoint.export import prepare_export
    from distill_nemo.checkpoint.hub_models import named
    from distill_nemo.checkpoint.identity import run_record
    from distill_nemo.checkpoint.load import check_whole, load_checkpoint, newest_whole
    from distill_nemo.models.provider import finalise
    from distill_nemo.runtime.device import resolve_dtype, setup_device
    from distill_nemo.runtime.everyone import Everyone
    from distill_nemo.runtime.process_groups import rank
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.calibration import calibrate
    from distill_nemo.training.data import build_run_datasets, check_run_data
    from distill_nemo.training.loop import Loop
    from distill_nemo.training.setup import build_train_state, release_gradients
    from distill_nemo.training.stores import stored_teacher

    device, dtype = setup_device(), resolve_dtype(config.training.dtype)
    require(
        device.type == "cuda" or dtype != torch.bfloat16,
        f'training.dtype = "{config.training.dtype}" needs a GPU, and there is none; set it to "float32" or "auto"',
    )
    Everyone().on_rank_0(partial(check_run_data, config, models.student))
    if config.checkpoint.export:
        prepare_export(config, models.student, dtype)
    newest = newest_whole(checkpoint_root(config.output_dir))
    changed = ""
    if newest is not None:
        saved, now = read_record(newest), run_record(config)
        check_resumable(saved, now, config.checkpoint.resume)
        changed = "".join(f"\n{line}" for line in changes(saved, now))
    teacher = config.teacher.checkpoint if config.teacher else None
    check_whole(teacher, config.student.checkpoint if newest is None else None)
    seed_everything(config.training.seed)
    train_state = build_train_state(config, models, dtype, newest is None, stored_teacher(config))
    datasets = build_run_datasets(config, models.student)  # writes files, so it comes after every check of the models
    loop = Loop(config, train_state, datasets, device)
    if newest is not None:
        state = load_checkpoint(newest, train_state.unwrapped, train_state.optimizer, train_state.scheduler)
        loop.state.update(state)
        if rank() == 0:
            print(f"resumed from {newest} at step {state['step']} of {config.training.steps}{changed}", flush=True)
    else:
        calibrate(loop)
    if rank() == 0:
        save_yaml(named(config), Path(config.output_dir) / "config.yaml")
    torch.distributed.barrier()
    stopped = loop.run()
    release_gradients(train_state.unwrapped)
    return stopped, [finalise(chunk) for chunk in train_state.unwrapped]


def main(arguments: list[str] | None = None) -> None:
    """Run a config file, under torchrun or alone: `python -m distill_nemo CONFIG.yaml`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m distill_nemo", description=main.__doc__)
    parser.add_argument("config", type=Path, help="the config.yaml that every run writes beside its checkpoints")
    path = parser.parse_args(arguments).config
    with errors_in_one_screen():
        run_config(load_yaml(path))

"""`distill`: what a recipe binds and an executor launches on every rank.

Light at import: the launcher reads it to learn the recipe's fields.
"""

import json
import sys
from pathlib import Path

from distill_nemo.config import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
    check,
    from_dict,
    load_yaml,
    save_yaml,
    to_dict,
)


def distill(
    output_dir: str,
    student: StudentConfig,
    teacher: TeacherConfig | None = None,
    distillation: DistillationConfig | None = None,
    parallelism: ParallelismConfig | None = None,
    data: DataConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    training: TrainingConfig | None = None,
    checkpoint: CheckpointConfig | None = None,
    logging: LoggingConfig | None = None,
) -> None:
    """Train `student`, with a teacher to imitate or without one, and export it to Hugging Face format.

    Args:
        output_dir: everything the run writes goes below it.
        student: the model to train.
        teacher: the frozen model to imitate; None trains on the data alone.
        distillation: divergence, temperature, hidden losses, balancer.
        parallelism: tensor, pipeline and data parallel sizes.
        data: token files made by `nemo distill prepare`.
        optimizer: Adam and its schedule.
        training: steps, batch sizes, evaluation.
        checkpoint: when to save, how many to keep.
        logging: where the metrics go besides `metrics.jsonl`.

    Raises:
        ValueError: for a config that cannot run, before anything is written.
    """
    run_config(
        RunConfig(
            output_dir,
            student,
            teacher,
            distillation or DistillationConfig(),
            parallelism or ParallelismConfig(),
            data or DataConfig(),
            optimizer or OptimizerConfig(),
            training or TrainingConfig(),
            checkpoint or CheckpointConfig(),
            logging or LoggingConfig(),
        )
    )


def run_config(config: RunConfig) -> None:
    """Run a whole config on this rank; exits with 128 + the signal's number when a signal stopped it."""
    from distill_nemo.runtime.process_groups import process_groups, rank, world_size

    config = from_dict(to_dict(config))  # a copy, and the one place where types are checked
    check(config, world_size())
    from distill_nemo.runtime.device import setup_device

    setup_device()
    config = resolve_models(config)
    check(config, world_size())
    with process_groups(config.parallelism):
        stopped = _train(config)
    if stopped:
        if rank() == 0:
            print(f"stopped by signal {stopped}; checkpoint written; the same command resumes", flush=True)
        sys.exit(128 + stopped)


def resolve_models(config: RunConfig) -> RunConfig:
    """The config with every architecture field filled in from the checkpoints."""
    from distill_nemo.models.architecture import resolve

    for role in ("student", "teacher"):
        model = getattr(config, role)
        if model is not None:
            setattr(config, role, resolve(model))
            limit = getattr(config, role).max_position_embeddings
            if limit is not None and config.data.sequence_length > limit:
                raise ValueError(
                    f"data.sequence_length = {config.data.sequence_length} is longer than the {role}'s "
                    f"max_position_embeddings = {limit}"
                )
    return config


def _train(config: RunConfig) -> int | None:
    import torch

    from distill_nemo.checkpoint.directory import check_resumable, checkpoint_root, latest
    from distill_nemo.checkpoint.load import load_checkpoint
    from distill_nemo.runtime.device import resolve_dtype, setup_device
    from distill_nemo.runtime.process_groups import rank
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.data import build_run_datasets
    from distill_nemo.training.loop import Loop
    from distill_nemo.training.setup import build_trainee

    device = setup_device()
    newest = latest(checkpoint_root(config.output_dir))
    if newest is not None:
        check_resumable(json.loads((newest / "run.json").read_text()), to_dict(config), config.checkpoint.resume)
    datasets = build_run_datasets(config)
    seed_everything(config.training.seed)
    trainee = build_trainee(config, resolve_dtype(config.training.dtype), load_weights=newest is None)
    loop = Loop(config, trainee, datasets, device)
    if newest is not None:
        state = load_checkpoint(newest, trainee.unwrapped, trainee.optimizer, trainee.scheduler)
        loop.state.update(state)
        if rank() == 0:
            print(f"resumed from {newest} at step {state['step']} of {config.training.steps}", flush=True)
    if rank() == 0:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        save_yaml(config, Path(config.output_dir) / "config.yaml")
    torch.distributed.barrier()
    stopped = loop.run()
    if stopped is None and config.checkpoint.export:
        from distill_nemo.checkpoint.export import export_from_run

        export_from_run(config)
    return stopped


def main(arguments: list[str] | None = None) -> None:
    """`python -m distill_nemo CONFIG.yaml`: run a snapshot, under torchrun or alone."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m distill_nemo", description=main.__doc__)
    parser.add_argument("config", type=Path, help="the config.yaml that every run writes beside its checkpoints")
    try:
        run_config(load_yaml(parser.parse_args(arguments).config))
    except ValueError as error:
        sys.exit(f"error: {error}")

"""Checks before any process starts: refuse what the workers would refuse, as far as Megatron is not needed for it."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import nemo_run as run

from distill_nemo.checkpoint.hub_models import FIELDS
from distill_nemo.checks import check_job
from distill_nemo.config import ExportConfig, ParallelismConfig, RunConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.executors.descriptor import WorkDir
from distill_nemo.executors.known import descriptor_of
from distill_nemo.executors.worker_config import paths_of
from distill_nemo.fields import require
from distill_nemo.hub import description_of, hub_name
from distill_nemo.job_config import EvaluateConfig, JobConfig
from distill_nemo.models.sources import CheckpointKind, find_checkpoint, is_quantized_already
from distill_nemo.models.stored_quantization import needs_package
from distill_nemo.publishing.push import TOKEN, PushError, check_push
from distill_nemo.quantization import is_quantized


def check_launch(config: JobConfig, executor: run.Executor, dryrun: bool = False) -> None:
    """Refuse a job that cannot work on an executor. A dry run for a cluster warns of files that are not here.

    Raises:
        ValueError: from `checks`, with the node counts that would fit; for secrets in plain text; for missing
            checkpoints and token files; for quantised weights that are not read, and quantised students that their
            layout or export cannot have; for paths that would mean another place in the job; for a push without a
            token, or that the hub would refuse; for a missing `sbatch` or a kubeconfig without a cluster.
    """
    descriptor = descriptor_of(executor)
    descriptor.check(executor)
    if executor.nnodes() < 1 or executor.nproc_per_node() < 1:
        raise ValueError(
            f"run.executor: {executor.nnodes()} nodes x {executor.nproc_per_node()} ranks; both must be at least 1"
        )
    work_dir = descriptor.work_dir(executor)
    missing: list[str] = []
    if work_dir.fresh:
        _check_absolute(config, work_dir)
    elif work_dir.here is not None:
        missing = _check_files(config, work_dir.here, may_be_missing=dryrun and descriptor.manifest is not None)
    check_fits_nodes(config, executor)
    student = "student.checkpoint" if isinstance(config, RunConfig) else "checkpoint"
    if work_dir.here is not None and student not in missing and isinstance(config, RunConfig | ExportConfig):
        _check_quantized(config, executor.nnodes() * executor.nproc_per_node(), work_dir.here)
    _check_push(config, executor, dryrun)
    descriptor.preflight(config, executor, dryrun)


def check_fits_nodes(config: JobConfig, executor: run.Executor) -> None:
    """Call `checks.check_job` for the executor's ranks.

    Raises:
        ValueError: from `check_job`, with the node counts that would fit.
    """
    try:
        check_job(config, executor.nnodes() * executor.nproc_per_node())
    except ValueError as error:
        raise ValueError(f"{error}{_fitting_nodes(config, executor)}") from None


def _fitting_nodes(config: JobConfig, executor: run.Executor) -> str:
    """Return a sentence with the closest node counts that would pass; empty if no node count would."""
    if isinstance(executor, run.LocalExecutor):  # always one node
        return ""
    nodes, devices, fitting = executor.nnodes(), executor.nproc_per_node(), []
    most = max(2 * nodes, (config.parallelism or ParallelismConfig()).model_parallel_size)
    for count in range(1, most + 1):
        try:
            check_job(config, count * devices)
            fitting.append(count)
        except ValueError:
            continue
    if not fitting:
        return ""
    closest = sorted(sorted(fitting, key=lambda count: abs(count - nodes))[:5])
    return (
        f". You asked for {nodes} nodes x {devices} devices; with {devices} devices a node, run.executor.nodes = "
        f"{', '.join(map(str, closest))} fit"
    )


def _check_absolute(config: JobConfig, work_dir: WorkDir) -> None:
    for name, path in paths_of(config):
        if not Path(path).is_absolute() and not (name in FIELDS and hub_name(path)):
            raise ValueError(
                f'{name} = "{path}" is relative, and the job runs {work_dir.fresh}, in a directory that is new each '
                f"time: write the absolute path that it has there{work_dir.advice}"
            )


def _check_push(config: JobConfig, executor: run.Executor, dryrun: bool) -> None:
    """Refuse a push without a token; ask the hub, if this command has the job's token. Rank 0 will ask it again."""
    match config:
        case RunConfig():
            push, output = config.checkpoint, f"{config.output_dir}/student"
        case ExportConfig():
            push, output = config, config.output
        case _:
            return
    if push.push_to is None:
        return
    descriptor = descriptor_of(executor)
    require(
        descriptor.has_variable(executor, TOKEN),
        f"push_to = {push.push_to} needs a token where the job runs: export {TOKEN} before this command; on Kubernetes "
        f"""put it into a Secret: run.executor.secrets='{{"{TOKEN}": "SECRET/KEY"}}'""",
    )
    here = descriptor.work_dir(executor).here
    if dryrun or here is None or TOKEN not in os.environ:
        return
    try:
        check_push(push, here / output)
    except PushError as error:  # a login node may have no network where the others have one
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _check_files(config: JobConfig, work_dir: Path, may_be_missing: bool) -> list[str]:
    """Refuse checkpoints and token files that cannot be read. Return the fields of those that are missing."""
    missing = {}
    for name, path in paths_of(config):
        if name in FIELDS and hub_name(path, work_dir):
            continue
        if name.split(".")[-1] in ("checkpoint", "model", "baseline", "teacher"):
            if may_be_missing and not Path(work_dir, path).exists():
                missing[name] = path
                continue
            try:
                found = find_checkpoint(work_dir / path)
                if found.kind is CheckpointKind.HUGGING_FACE and not isinstance(config, EvaluateConfig):
                    needs_package(found.weights)  # refuses weights that are not read
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif name in ("data", "data.train", "data.valid") and not corpus_at(work_dir / path).files:
            if not may_be_missing:
                raise ValueError(f"{name}: no file {Path(work_dir, path)}.idx; make it with `nemo distill prepare`")
            missing[name] = path
    if missing:
        named = ", ".join(f"{name} = {path}" for name, path in missing.items())
        print(f"warning: not on this machine, and so not checked: {named}", file=sys.stderr, flush=True)
    return list(missing)


def _check_quantized(config: RunConfig | ExportConfig, ranks: int, here: Path) -> None:
    """Call `check_quantized` for a student that is quantised, or is to be exported as if it were. Imports Megatron."""
    if isinstance(config, RunConfig):
        checkpoint, stored_as = config.student.checkpoint, config.checkpoint.quantized
        concerned = is_quantized(config.quantization) or stored_as == "compressed-tensors"
        if checkpoint is None and config.student.num_layers is None:  # a stage before this job makes the student
            return
    else:
        checkpoint, concerned = config.checkpoint, config.quantized == "compressed-tensors"
    if checkpoint is not None and hub_name(checkpoint, here) is None:
        checkpoint = str(here / checkpoint)
        concerned = concerned or is_quantized_already(find_checkpoint(Path(checkpoint)))
    elif checkpoint is not None and concerned:
        try:
            checkpoint = description_of(checkpoint)
        except ValueError as error:  # a login node may have no network where the others have one
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return
    if not concerned:
        return
    from distill_nemo.checkpoint.export import check_quantized

    if isinstance(config, ExportConfig):
        assert checkpoint is not None, "an export has one"
        check_quantized(replace(config, checkpoint=checkpoint), ranks)
    else:
        check_quantized(replace(config, student=replace(config.student, checkpoint=checkpoint)), ranks)

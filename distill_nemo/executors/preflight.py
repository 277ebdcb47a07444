"""Refuse what the workers would refuse, as far as it can be known without Megatron: before any process starts."""

from pathlib import Path

import nemo_run as run

from distill_nemo.checks import check
from distill_nemo.config import RunConfig
from distill_nemo.executors.descriptor import WorkDir
from distill_nemo.executors.known import descriptor_of
from distill_nemo.executors.worker_config import paths_of
from distill_nemo.models.sources import find_checkpoint


def check_launch(config: RunConfig, executor: run.Executor, dryrun: bool = False) -> None:
    """Refuse a run that cannot work on an executor.

    Raises:
        ValueError: as `checks.check`, with the node counts that would do; for secrets in clear; for checkpoints and
            token files that are not there; for paths that would mean another place in the job; without `sbatch`, or a
            cluster in the kubeconfig.
    """
    descriptor = descriptor_of(executor)
    descriptor.check(executor)
    if executor.nnodes() < 1 or executor.nproc_per_node() < 1:
        raise ValueError(f"run.executor: {executor.nnodes()} nodes x {executor.nproc_per_node()} ranks are none")
    work_dir = descriptor.work_dir(executor)
    if work_dir.anew:
        _check_absolute(config, work_dir)
    elif work_dir.here is not None:
        _check_files(config, work_dir.here)
    check_fits_nodes(config, executor)
    descriptor.preflight(config, executor, dryrun)


def check_fits_nodes(config: RunConfig, executor: run.Executor) -> None:
    """Call `checks.check` for the executor's ranks.

    Raises:
        ValueError: as `check`, with the node counts that would do.
    """
    try:
        check(config, executor.nnodes() * executor.nproc_per_node())
    except ValueError as error:
        raise ValueError(f"{error}{_that_fit(config, executor)}") from None


def _that_fit(config: RunConfig, executor: run.Executor) -> str:
    """Return node counts that would pass; nothing when it is not the number of nodes that is wrong."""
    if isinstance(executor, run.LocalExecutor):  # always one node
        return ""
    nodes, devices, fitting = executor.nnodes(), executor.nproc_per_node(), []
    most = max(2 * nodes, config.parallelism.model_parallel_size)
    for count in range(1, most + 1):
        try:
            check(config, count * devices)
            fitting.append(count)
        except ValueError:
            continue
    ours = f". You asked for {nodes} nodes x {devices} devices"
    if fitting:
        nearest = sorted(sorted(fitting, key=lambda count: abs(count - nodes))[:5])
        return f"{ours}; with {devices} devices a node, run.executor.nodes = {', '.join(map(str, nearest))} fit"
    return ""


def _check_absolute(config: RunConfig, work_dir: WorkDir) -> None:
    for name, path in paths_of(config):
        if not Path(path).is_absolute():
            raise ValueError(
                f'{name} = "{path}" is relative, and the job runs {work_dir.anew}, in a directory that is new each '
                f"time: write the absolute path that it has there{work_dir.advice}"
            )


def _check_files(config: RunConfig, work_dir: Path) -> None:
    for name, path in paths_of(config):
        if name.endswith(".checkpoint"):
            try:
                find_checkpoint(work_dir / path)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif name in ("data.train", "data.valid") and not Path(work_dir, f"{path}.idx").is_file():
            raise ValueError(f"{name}: no file {Path(work_dir, path)}.idx; make it with `nemo distill prepare`")

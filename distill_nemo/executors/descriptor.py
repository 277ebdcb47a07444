"""Descriptor of a kind of executor, asked by the launcher. A new kind is one descriptor, named in `known.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run

from distill_nemo.config import RunConfig
from distill_nemo.executors.watch.jobs import ClusterJob


@dataclass(frozen=True)
class WorkDir:
    """Directory that the ranks run in, which relative paths begin at."""

    here: Path | None = None  # on this machine, so that files can be looked for
    anew: str = ""  # a directory that is new each time: where it is; relative paths are refused
    advice: str = ""  # what to set instead


IN_A_CONTAINER = WorkDir(anew="in a container")


def _nothing(*_: Any) -> None:
    """Accept everything."""


@dataclass(frozen=True)
class ExecutorDescriptor:
    """One kind of executor. The defaults are those of a container that nothing is known of."""

    executor: type[run.Executor]
    # Make the executor from `run.executor.FIELD=VALUE`.
    arguments: Callable[..., run.Config]
    # Fields of NeMo-Run's executor that cannot be set.
    hidden: tuple[str, ...] = ()
    # Refuse an executor whose own fields cannot work.
    check: Callable[[Any], None] = _nothing
    # Return where the ranks run.
    work_dir: Callable[[Any], WorkDir] = lambda executor: IN_A_CONTAINER
    # Refuse (config, executor, dryrun) once all else is right, by what only the machine or the cluster can say.
    preflight: Callable[[RunConfig, Any, bool], None] = _nothing
    # Return a job that NeMo-Run has submitted as one that can be watched; None: NeMo-Run itself waits for it.
    job: Callable[[Any], ClusterJob] | None = None
    # Return the text that submits a job of the experiment in a directory; None: a dry run shows the command.
    manifest: Callable[[Any, Path], str] | None = None

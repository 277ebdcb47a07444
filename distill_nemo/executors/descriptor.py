"""The launcher's view of a kind of executor. A new kind is one descriptor, listed in `known.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run

from distill_nemo.executors.watch.jobs import ClusterJob
from distill_nemo.job_config import JobConfig


@dataclass(frozen=True)
class WorkDir:
    """Working directory of the ranks, to which relative paths refer."""

    here: Path | None = None  # visible from this machine, so files can be checked before the launch
    fresh: str = ""  # set if each job gets a new directory: says where. Relative paths are then refused
    advice: str = ""  # what to set instead

    @property
    def is_current(self) -> bool:
        """True if it is this process's own, so that relative paths mean the same."""
        return self.here is not None and self.here.resolve() == Path.cwd()


IN_A_CONTAINER = WorkDir(fresh="in a container")


def on_one_node(executor: Any, make: Callable[[int], Any], devices: int | None) -> Any:
    """Return an executor of as many ranks as `devices` says, or a node of another executor has."""
    return make(devices or executor.nproc_per_node())


def _nothing(*_: Any) -> None:
    """Accept everything."""


@dataclass(frozen=True)
class ExecutorDescriptor:
    """One kind of executor. The defaults suit a container about which nothing is known."""

    executor: type[run.Executor]
    # Builds the executor from `run.executor.FIELD=VALUE`.
    arguments: Callable[..., run.Config]
    # Fields of NeMo-Run's executor that users cannot set.
    hidden: tuple[str, ...] = ()
    # Refuses an executor whose own fields cannot work.
    check: Callable[[Any], None] = _nothing
    # Returns the working directory of the ranks.
    work_dir: Callable[[Any], WorkDir] = lambda executor: IN_A_CONTAINER
    # Returns True if the ranks get an environment variable, or that cannot be seen from here.
    has_variable: Callable[[Any, str], bool] = lambda executor, name: True
    # Runs last, on (config, executor, dryrun): checks that need the machine or the cluster.
    preflight: Callable[[JobConfig, Any, bool], None] = _nothing
    # Wraps a job that NeMo-Run has submitted so that it can be watched. None: NeMo-Run waits for it itself.
    job: Callable[[Any], ClusterJob] | None = None
    # Returns the arguments of an executor of this many nodes and ranks on each.
    size: Callable[[int, int], list[str]] = lambda nodes, devices: [f"nodes={nodes}", f"devices={devices}"]
    # Returns the executor of a job beside that of an executor, on (executor, function from ranks to an executor of one
    # node, ranks that are asked for). Raises ValueError if there is no place for it.
    beside: Callable[[Any, Callable[[int], Any], int | None], Any] = on_one_node
    # True if NeMo-Run must submit the job beside as one that depends on the first.
    waits_for_the_first: bool = False
    # Prepares an executor whose job waits in the queue for another one. None: its scheduler starts every job at once.
    chain: Callable[[Any], None] | None = None
    # Returns what a dry run prints for a job of the experiment in a directory. None: a dry run prints the command.
    manifest: Callable[[Any, Path], str] | None = None

"""Executor for this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import fiddle as fdl
import nemo_run as run

from distill_nemo.executors.descriptor import ExecutorDescriptor, WorkDir
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.fields import typed

ENVIRONMENT = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # torchrun sets 1 too, and warns about it
    "LOGLEVEL": os.environ.get("LOGLEVEL", "ERROR"),  # NeMo-Run would make torchrun log every step of its own
    # torchrun's default gives ranks 30 s to save after Ctrl-C.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"),
}


@typed("run.executor.")
def local_config(processes: int = 1) -> run.Config[run.LocalExecutor]:
    """This machine, `processes` ranks under torchrun: one per GPU, where there are GPUs.

    Args:
        processes: number of ranks.
    """
    if processes < 1:
        raise ValueError(f"run.executor.processes must be at least 1, got {processes}")
    # torchrun is looked up on PATH, which lacks it if the virtual environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    check_rendezvous()
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=processes,
        launcher=run.Config(run.Torchrun, rdzv_backend="loopback"),  # runtime/rendezvous.py
        env_vars={"PATH": path, "DISTILL_NEMO_LAUNCHER": str(os.getpid()), **ENVIRONMENT},
    )


def local(processes: int = 1) -> run.Executor:
    """Return the executor that `run.executor=local` names on the command line."""
    return fdl.build(local_config(processes))


def check_rendezvous() -> None:
    """Refuse an environment whose torchrun lacks the backends of runtime/rendezvous.py."""
    if not {"loopback", "nodes"} <= entry_points(group="torchrun.handlers").names:
        raise ValueError("torchrun does not know distill-nemo's rendezvous: install it again, `pip install -e .`")


def num_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use, without importing torch."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for device in visible.split(",") if (name := device.strip()) not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def _with_the_gpus_that_are_left(
    executor: run.LocalExecutor, make: Callable[[int], run.LocalExecutor], devices: int | None
) -> run.LocalExecutor:
    """Return the executor of a job beside a run's ranks, which have the first GPUs; on CPU, of one process.

    Raises:
        ValueError: if too few are left.
    """
    gpus, ranks = visible_gpus(), executor.nproc_per_node()
    if not gpus:
        return make(devices or 1)
    wanted, left = devices or 1, len(gpus) - ranks
    if left < wanted:
        raise ValueError(
            f"benchmarks.tasks: the run has {ranks} of this machine's {len(gpus)} GPUs, and its benchmarks need "
            f"{wanted} of their own: start fewer processes, or leave benchmarks.tasks out and run `nemo distill "
            "evaluate steps_of=` on another machine, or afterwards"
        )
    beside = make(devices or left)
    beside.env_vars["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[-(devices or left) :])
    return beside


def _check(executor: run.LocalExecutor) -> None:
    refuse_secrets(vars(executor), "export it before this command")
    if executor.nodes != 1:
        raise ValueError(
            f"run.executor.nodes = {executor.nodes}: the local executor has one node; set the ranks with processes="
        )


LOCAL = ExecutorDescriptor(
    run.LocalExecutor,
    local_config,
    check=_check,
    work_dir=lambda executor: WorkDir(here=Path(".")),
    has_variable=lambda executor, name: name in os.environ,
    size=lambda nodes, devices: [f"processes={devices}"],
    beside=_with_the_gpus_that_are_left,
)

"""Where a recipe runs. SLURM and Kubernetes follow in a later release."""

import os
import sys
from pathlib import Path

import fiddle as fdl
import nemo_run as run

# torchrun sets 1 too, and warns about it.
_THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@run.cli.factory(name="local", target=run.Executor)
def local_config(processes: int = 1) -> run.Config[run.LocalExecutor]:
    """This machine, `processes` ranks under torchrun: one per GPU, where there are GPUs."""
    # torchrun is looked up on PATH, where it need not be: a venv can be used without being activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return run.Config(
        run.LocalExecutor, ntasks_per_node=processes, launcher="torchrun", env_vars={"PATH": path, **_THREADS}
    )


def local(processes: int = 1) -> run.Executor:
    """The executor that `run.executor=local` names on the command line, for Python."""
    return fdl.build(local_config(processes))

"""Where a recipe runs. SLURM and Kubernetes follow in a later release."""

import sys
from pathlib import Path

import nemo_run as run


@run.cli.factory
def local(processes: int = 1) -> run.Executor:
    """This machine, `processes` ranks under torchrun (one per GPU where there are GPUs)."""
    path = f"{Path(sys.executable).parent}:{__import__('os').environ.get('PATH', '')}"
    return run.LocalExecutor(ntasks_per_node=processes, launcher="torchrun", env_vars={"PATH": path})

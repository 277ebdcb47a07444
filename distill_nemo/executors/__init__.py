"""Where a recipe runs, and what is seen of it: `local()`, `slurm()`. Light at import."""

from distill_nemo.executors.interrupts import passing_on_signals
from distill_nemo.executors.local import local, local_config, num_gpus
from distill_nemo.executors.slurm import slurm, slurm_config
from distill_nemo.executors.stages import Stages

EXECUTORS = {"local": local_config, "slurm": slurm_config}  # what `run.executor=` may name

__all__ = ["EXECUTORS", "Stages", "local", "num_gpus", "passing_on_signals", "slurm"]

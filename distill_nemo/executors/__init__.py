"""Where a recipe runs, and what is seen of it: `local()`, `slurm()`, `kubernetes()`. Light at import."""

from distill_nemo.executors.interrupts import passing_on_signals
from distill_nemo.executors.kubernetes import kubernetes, kubernetes_config
from distill_nemo.executors.local import local, local_config, num_gpus
from distill_nemo.executors.slurm import slurm, slurm_config
from distill_nemo.executors.stages import Stages
from distill_nemo.executors.trainjob import KubernetesExecutor
from distill_nemo.executors.worker_config import run_config_of

EXECUTORS = {
    "local": local_config,
    "slurm": slurm_config,
    "kubernetes": kubernetes_config,
}  # what `run.executor=` may name

__all__ = [
    "EXECUTORS",
    "KubernetesExecutor",
    "Stages",
    "kubernetes",
    "local",
    "num_gpus",
    "passing_on_signals",
    "run_config_of",
    "slurm",
]

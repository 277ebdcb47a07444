"""Executors that launch a recipe and watch its job: `local()`, `slurm()`, `kubernetes()`. Light at import."""

from distill_nemo.executors.experiment import WatchedExperiment
from distill_nemo.executors.known import EXECUTORS
from distill_nemo.executors.kubernetes.arguments import kubernetes
from distill_nemo.executors.kubernetes.trainjob import KubernetesExecutor
from distill_nemo.executors.local import local, num_gpus
from distill_nemo.executors.preflight import check_launch
from distill_nemo.executors.slurm.arguments import slurm
from distill_nemo.executors.watch.interrupts import passing_on_signals
from distill_nemo.executors.worker_config import run_config_of

__all__ = [
    "EXECUTORS",
    "KubernetesExecutor",
    "WatchedExperiment",
    "check_launch",
    "kubernetes",
    "local",
    "num_gpus",
    "passing_on_signals",
    "run_config_of",
    "slurm",
]

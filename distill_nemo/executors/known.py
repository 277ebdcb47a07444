"""Executors that `run.executor=` may name."""

from typing import Any

import nemo_run as run

from distill_nemo.executors.descriptor import ExecutorDescriptor
from distill_nemo.executors.kubernetes import KUBERNETES
from distill_nemo.executors.local import LOCAL
from distill_nemo.executors.slurm import SLURM
from distill_nemo.executors.watch.jobs import ClusterJob

EXECUTORS = {"local": LOCAL, "slurm": SLURM, "kubernetes": KUBERNETES}


def descriptor_of(executor: run.Executor) -> ExecutorDescriptor:
    """Return the descriptor of an executor; for NeMo-Run's others, one of containers that nothing is known of."""
    for descriptor in EXECUTORS.values():
        if isinstance(executor, descriptor.executor):
            return descriptor
    return ExecutorDescriptor(type(executor), lambda **fields: run.Config(type(executor), **fields))


def cluster_job(job: Any) -> ClusterJob | None:
    """Return a job of NeMo-Run's as it is watched; None if it runs here, or was not submitted."""
    watched = descriptor_of(job.executor).job
    return watched(job) if watched is not None and job.handle else None

"""Executors that `run.executor=` accepts."""

from typing import Any

import nemo_run as run

from distill_nemo.executors.descriptor import ExecutorDescriptor
from distill_nemo.executors.kubernetes import KUBERNETES
from distill_nemo.executors.local import LOCAL
from distill_nemo.executors.slurm import SLURM
from distill_nemo.executors.watch.jobs import ClusterJob

EXECUTORS = {"local": LOCAL, "slurm": SLURM, "kubernetes": KUBERNETES}


def descriptor_of(executor: run.Executor) -> ExecutorDescriptor:
    """Return the descriptor of an executor; NeMo-Run's other executors get the defaults."""
    for descriptor in EXECUTORS.values():
        if isinstance(executor, descriptor.executor):
            return descriptor
    return ExecutorDescriptor(type(executor), lambda **fields: run.Config(type(executor), **fields))


def cluster_job(job: Any) -> ClusterJob | None:
    """Wrap a job of NeMo-Run so that it can be watched; None if it runs on this machine or was not submitted."""
    wrap = descriptor_of(job.executor).job
    return wrap(job) if wrap is not None and job.handle else None

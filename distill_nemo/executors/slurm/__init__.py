"""SLURM. NeMo-Run writes the batch script and submits it, here or over SSH; we check the script and watch the job."""

import os

import nemo_run as run

from distill_nemo.executors.descriptor import ExecutorDescriptor
from distill_nemo.executors.slurm.arguments import slurm_config
from distill_nemo.executors.slurm.jobs import SlurmJob
from distill_nemo.executors.slurm.script import (
    batch_script,
    begins_with_the_first,
    cancelled_with_the_one_before,
    check_sbatch,
    check_script,
    work_dir,
)

SLURM = ExecutorDescriptor(
    run.SlurmExecutor,
    slurm_config,
    hidden=(
        "setup_lines",  # the shell would print them to the log, with their values; `setup` avoids that
        "env_vars",  # `env` quotes values for the script
        "array",  # a run is one job
        "heterogeneous",
        "dependencies",  # takes NeMo-Run's handles; additional_parameters='{"dependency": "afterany:1"}' takes job ids
    ),
    check=check_script,
    work_dir=work_dir,
    has_variable=lambda executor, name: name in os.environ or not isinstance(executor.tunnel, run.LocalTunnel),
    preflight=check_sbatch,
    job=SlurmJob.of,
    beside=begins_with_the_first,
    waits_for_the_first=True,
    chain=cancelled_with_the_one_before,
    manifest=batch_script,
)

"""SLURM: NeMo-Run writes the batch script and submits it, here or over SSH; we check it before and watch the job."""

import nemo_run as run

from distill_nemo.executors.descriptor import ExecutorDescriptor
from distill_nemo.executors.slurm.arguments import slurm_config
from distill_nemo.executors.slurm.jobs import SlurmJob
from distill_nemo.executors.slurm.script import batch_script, check_sbatch, check_script, work_dir

SLURM = ExecutorDescriptor(
    run.SlurmExecutor,
    slurm_config,
    hidden=(
        "setup_lines",  # the shell would write them to the log, values and all; `setup` does not
        "env_vars",  # `env` is quoted for the script
        "array",  # a run is one job
        "heterogeneous",
        "dependencies",  # handles of NeMo-Run's; additional_parameters='{"dependency": "afterany:1"}' takes job ids
    ),
    check=check_script,
    work_dir=work_dir,
    preflight=check_sbatch,
    job=SlurmJob.of,
    manifest=batch_script,
)

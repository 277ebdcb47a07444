"""Check the batch script that NeMo-Run writes before it is submitted, and print it for a dry run."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home

from distill_nemo.executors.descriptor import IN_A_CONTAINER, WorkDir, on_one_node
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.executors.slurm.arguments import ADVICE_ON_SECRETS, SHIPPED
from distill_nemo.job_config import JobConfig

UNQUOTED = ("container_mounts", "container_env", "srun_args")  # lists of arguments that reach srun unquoted
ELSEWHERE = WorkDir(
    fresh="on another machine",
    advice=", or name the directory that it is relative to: run.executor.workdir=",
)


def check_script(executor: run.SlurmExecutor) -> None:
    """Refuse secrets, and values that would not reach SLURM as typed.

    NeMo-Run 0.11.1 quotes the values of #SBATCH lines and nothing else.

    Raises:
        ValueError: naming the field.
    """
    refuse_secrets(vars(executor), ADVICE_ON_SECRETS)
    for name, folder in (("run.executor.job_dir", executor.tunnel.job_dir), ("NEMORUN_HOME", get_nemorun_home())):
        if shlex.quote(folder) != folder and folder:
            raise ValueError(f'{name} = "{folder}" has characters that NeMo-Run does not quote in its scripts')
    prefix = executor.job_name_prefix or ""
    if not re.fullmatch(r"\w[\w.-]*", prefix, re.ASCII):
        raise ValueError(f'run.executor.job_name_prefix must be letters, digits, ".", "_" or "-", got "{prefix}"')
    flags = [(name, getattr(executor, name, None)) for name in executor.SBATCH_FLAGS]
    for key, value in (executor.additional_parameters or {}).items():
        flags.append(("additional_parameters", value))
        if not re.fullmatch(r"\w[\w-]*", key, re.ASCII):
            raise ValueError(f'run.executor.additional_parameters: "{key}" is not the name of an option of sbatch')
    arguments = [("container_image", executor.container_image or "x")]
    arguments += [(name, each) for name in UNQUOTED for each in getattr(executor, name) or []]
    for name, value in flags:
        if "\n" in str(value):
            raise ValueError(f"run.executor.{name} has two lines, and in a batch script the second is a command")
    for name, argument in arguments:
        if not _is_one_word(argument):
            raise ValueError(
                f"run.executor.{name}: the shell would not read {argument} literally; write {shlex.quote(argument)}"
            )
    _check_setup(executor.setup_lines or "")
    if executor.container_image is None:
        _check_replaced(executor, [*flags, *arguments])


def _is_one_word(text: str) -> bool:
    """Return True if the shell reads `text` as a single literal word."""
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return len(words) == 1 and (shlex.quote(words[0]) == text or f"'{words[0]}'" == text)


def _check_setup(setup: str) -> None:
    """Refuse set-up lines that bash cannot parse, and a here-document without an end, which would hold the job."""
    english = {**os.environ, "LC_ALL": "C"}
    parsed = subprocess.run(["bash", "-n"], input=setup, env=english, capture_output=True, text=True, check=False)
    said = parsed.stderr.strip().splitlines()
    if parsed.returncode:
        raise ValueError(f"run.executor.setup: bash cannot parse it: {said[0]}")
    if unended := [line for line in said if "here-document" in line]:
        raise ValueError(f"run.executor.setup: bash cannot find its end: {unended[0]}")


def _check_replaced(executor: run.SlurmExecutor, others: list[tuple[str, Any]]) -> None:
    """Refuse paths that contain "/nemo_run", which NeMo-Run replaces in its scripts if there is no container."""
    texts = [
        *(("setup", line) for line in (executor.setup_lines or "").splitlines()),
        *others,
        *(("env", value) for value in executor.env_vars.values()),
        ("job_dir", executor.tunnel.job_dir or get_nemorun_home()),
    ]
    for name, text in texts:
        if "/nemo_run" in str(text).replace(SHIPPED, ""):
            raise ValueError(
                f'run.executor.{name}: NeMo-Run replaces "/nemo_run" in its scripts, so no path may contain it: {text}'
            )


def work_dir(executor: run.SlurmExecutor) -> WorkDir:
    """Return the directory that `srun --chdir` names. It is on this machine unless the tunnel is SSH."""
    given = [value.partition("=")[2] for value in executor.srun_args or [] if value.startswith("--chdir=")]
    if executor.container_image is not None:
        return IN_A_CONTAINER
    if not given:
        return ELSEWHERE
    return WorkDir(here=Path(given[-1])) if isinstance(executor.tunnel, run.LocalTunnel) else WorkDir()


def check_sbatch(config: JobConfig, executor: run.SlurmExecutor, dryrun: bool) -> None:
    """Refuse a machine that cannot submit.

    Raises:
        ValueError: if there is no `sbatch` and no login node is named.
    """
    if isinstance(executor.tunnel, run.LocalTunnel) and not dryrun and shutil.which("sbatch") is None:
        raise ValueError(
            "`sbatch` is not on PATH: run this command on a login node of the cluster, or name one with "
            "run.executor.host=, user= and job_dir=; --dryrun shows what would be submitted"
        )


def cancelled_with_the_one_before(executor: run.SlurmExecutor) -> None:
    """Let SLURM cancel the job if the one that it waits for fails. It would be queued forever."""
    executor.additional_parameters = {"kill-on-invalid-dep": "yes", **(executor.additional_parameters or {})}


def begins_with_the_first(
    executor: run.SlurmExecutor, make: Callable[[int], run.SlurmExecutor], devices: int | None
) -> run.SlurmExecutor:
    """Return the executor of a job that SLURM starts once the first one runs, so that no node waits for that."""
    beside = on_one_node(executor, make, devices)
    beside.dependency_type = "after"
    return beside


def batch_script(job: Any, directory: Path) -> str:
    """Return the script of a NeMo-Run job, headed by the command that submits it."""
    path = directory / f"{job.executor.job_name}_sbatch.sh"
    command = " ".join(job._dryrun_info.request.launch_cmd)
    return f"# {command} {job.executor.tunnel.job_dir}/{path.name}\n{path.read_text()}"

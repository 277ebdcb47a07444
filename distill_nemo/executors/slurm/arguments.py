"""SLURM: what `sbatch` is told, from arguments that a user of a cluster knows.

NeMo-Run writes the batch script and submits it, here or over SSH; `--dryrun` prints it.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run

from distill_nemo.executors.local import ENVIRONMENT, check_rendezvous
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.fields import suggest

PACKAGERS = ("none", "git")
JOB_NAME_PREFIX = "distill."  # accounting's name of a job is read back up to its last dot
SHIPPED = "/nemo_run/code"  # NeMo-Run's name for the shipped code; without a container it puts the real path there
# Jobs that share a node must not meet at one port. NeMo-Run writes it into the script, where the shell computes it.
PORT = "$((20000+SLURM_JOB_ID%10000))"
QUIET = "{ set +vx; } 2>/dev/null"  # NeMo-Run's script has the shell write every line to the log, values and all
ADVICE_ON_SECRETS = (
    "export it before this command, as sbatch passes the environment on; or, with host, in a file on the cluster that "
    "run.executor.setup sources"
)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


class CommittedCode(run.GitArchivePackager):
    """Ships what git has committed, and says what it does not ship."""

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write the archive; uncommitted files are named on stderr."""
        status = subprocess.run(
            ["git", "-C", path, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
        changed = [line[3:] for line in status.stdout.splitlines()]
        if changed:
            names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            print(f"warning: not shipped, because not committed: {names} ({len(changed)} in all)", file=sys.stderr)
        return super().package(path, job_dir, name)


def slurm_config(
    account: str | None = None,
    partition: str | None = None,
    nodes: int = 1,
    devices: int = 1,
    gpus: bool = True,
    cpus_per_device: int | None = None,
    exclusive: bool = False,
    time: str = "01:00:00",
    stop_seconds: int = 300,
    retries: int = 0,
    container_image: str | None = None,
    container_mounts: list[str] | None = None,
    workdir: str | None = None,
    env: dict[str, str] | None = None,
    setup: list[str] | None = None,
    packager: str = "none",
    host: str | None = None,
    user: str | None = None,
    job_dir: str | None = None,
    identity: str | None = None,
    port: int | None = None,
) -> run.Config[run.SlurmExecutor]:
    """A SLURM cluster: one torchrun a node, `devices` ranks each. Other `sbatch` options are fields too, such as qos.

    Args:
        account: whom the time is charged to; None is the user's default.
        partition: where to queue; None is the cluster's default.
        nodes: how many.
        devices: ranks a node, one for each GPU.
        gpus: ask for `devices` GPUs a node; false on CPU nodes and where a partition hands out whole nodes only.
        cpus_per_device: CPU cores for each rank; None leaves it to the cluster, which may give a node's ranks one core.
        exclusive: share the nodes with no other job.
        time: limit, in one of SLURM's formats: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS.
        stop_seconds: how long before the limit the ranks are told to finish their step, save and end.
        retries: how often SLURM queues the job again when it does not end well: it goes on from its last checkpoint.
        container_image: Pyxis image; None runs in the environment of this command, or in what `setup` activates.
        container_mounts: SOURCE:TARGET, for the container.
        workdir: where the ranks run, so what relative paths mean; None is this directory, where the job sees it.
        env: environment of the ranks.
        setup: shell lines before the ranks start, such as module load.
        packager: "git" ships the committed code of this repository; "none" uses what is installed there.
        host: login node, when this machine is not of the cluster: everything goes over SSH.
        user: on the login node.
        job_dir: on the cluster's file system: where scripts and logs go. With host only; else NEMORUN_HOME.
        identity: file of the SSH key.
        port: of SSH.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    _check_numbers(
        {"nodes": nodes, "devices": devices, "cpus_per_device": cpus_per_device},
        {"stop_seconds": stop_seconds, "retries": retries},
    )
    if stop_seconds >= (limit := seconds_of(time)):
        raise ValueError(f"run.executor.stop_seconds = {stop_seconds} must be less than time = {time}, {limit} s")
    if packager not in PACKAGERS:
        raise ValueError(f'run.executor.packager = "{packager}" is not known.{suggest(packager, PACKAGERS)}')
    _check_container(container_image, container_mounts or [], workdir)
    refuse_secrets({"env": env, "setup": setup}, ADVICE_ON_SECRETS)
    tunnel = _tunnel(host=host, user=user, job_dir=job_dir, identity=identity, port=port)
    here = host is None and container_image is None
    if here:
        check_rendezvous()
        workdir = os.path.abspath(workdir or os.getcwd())
    elif workdir is not None and not os.path.isabs(workdir):
        raise ValueError(f'run.executor.workdir must be absolute with host, got "{workdir}"')
    _check_paths(workdir or "", sys.executable if here else "", container_image)
    return run.Config(
        run.SlurmExecutor,
        account=account,
        partition=partition,
        job_name_prefix=JOB_NAME_PREFIX,
        nodes=nodes,
        ntasks_per_node=1,
        torchrun_nproc_per_node=devices,
        gpus_per_node=devices if gpus else None,
        cpus_per_task=cpus_per_device and cpus_per_device * devices,
        exclusive=exclusive or None,
        time=time,
        signal=f"URG@{stop_seconds}" if stop_seconds else None,  # as runtime/signals.py says
        retries=retries,
        container_image=container_image and shlex.quote(container_image),  # NeMo-Run quotes no word of srun's
        container_mounts=[shlex.quote(mount) for mount in container_mounts or []],
        srun_args=[f"--chdir={workdir}"] if workdir else [],
        env_vars=_environment(env or {}, stop_seconds, cpus_per_device, devices, here, packager == "git"),
        setup_lines="\n".join([QUIET, *setup, "set -vx"]) if setup else None,
        packager=run.Config(CommittedCode if packager == "git" else run.Packager),
        launcher=run.Config(run.Torchrun, rdzv_port=PORT, rdzv_backend=_rendezvous(nodes, packager)),
        tunnel=tunnel,
        poll_estimated_start_time=False,
    )


def slurm(*args: Any, **kwargs: Any) -> run.Executor:
    """The executor that `run.executor=slurm` names on the command line, for Python: the same arguments."""
    return fdl.build(slurm_config(*args, **kwargs))


slurm.__signature__ = inspect.signature(slurm_config).replace(return_annotation=run.Executor)  # type: ignore


def _rendezvous(nodes: int, packager: str) -> str:
    """Return our backend, or torch's c10d, which unpickles, for shipped code: torchrun knows what is installed."""
    if packager == "git":
        return "c10d"
    return "loopback" if nodes == 1 else "nodes"


def _check_paths(workdir: str, python: str, container_image: str | None) -> None:
    """Refuse what NeMo-Run's scripts would spoil."""
    for path in (workdir, python):
        if container_image is None and "/nemo_run" in path:
            raise ValueError(f"NeMo-Run replaces /nemo_run in its scripts, so no path may hold it: {path}; rename it")
    if re.search(r"[^\w~@%+=:,./${}-]", workdir):
        raise ValueError(
            f'the job cannot run in "{workdir}": NeMo-Run does not quote run.executor.workdir in its scripts'
        )


def seconds_of(time: str) -> int:
    """Seconds of a limit in SLURM's formats.

    Raises:
        ValueError: for another format; for 0, which to SLURM is no limit.
    """
    match = _TIME.fullmatch(str(time))
    if match is None:
        raise ValueError(f'run.executor.time must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, got "{time}"')
    days, parts = match[1], [int(part) for part in match.groups()[1:] if part is not None]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)  # a single number is minutes
    seconds = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if not seconds:
        raise ValueError(f'run.executor.time must be more than nothing, got "{time}"')
    return seconds


def _check_numbers(at_least_1: dict[str, int | None], at_least_0: dict[str, int]) -> None:
    for least, values in ((1, at_least_1), (0, at_least_0)):
        for name, value in values.items():
            if value is not None and value < least:
                raise ValueError(f"run.executor.{name} must be at least {least}, got {value}")


def _check_container(image: str | None, mounts: list[str], workdir: str | None) -> None:
    if mounts and image is None:
        raise ValueError("run.executor.container_mounts needs container_image: without one, every path is the node's")
    for mount in mounts:
        if not re.fullmatch(r"[^:,]+(:[^:,]+){1,2}", mount):
            raise ValueError(f'run.executor.container_mounts must be SOURCE:TARGET each, got "{mount}"')
    if image is not None and workdir is not None:
        raise ValueError("run.executor.workdir goes without container_image: in a container, write absolute paths")


def _tunnel(**given: Any) -> run.Config:
    set_ones = {name: value for name, value in given.items() if value is not None}
    if "host" not in set_ones:
        if set_ones:
            raise ValueError(f"run.executor.{next(iter(set_ones))} goes with host, the login node; without, leave it")
        return run.Config(run.LocalTunnel, job_dir="")
    for name in ("user", "job_dir"):
        if name not in set_ones:
            raise ValueError(f"run.executor.host needs {name} too")
    for name in ("host", "user", "identity"):  # words of an rsync that NeMo-Run has a shell start
        value = set_ones.get(name, "x")
        if shlex.quote(value) != value or value.startswith("-"):
            raise ValueError(f'run.executor.{name} = "{value}" has characters that NeMo-Run does not quote')
    if not os.path.isabs(set_ones["job_dir"]):
        raise ValueError(f'run.executor.job_dir must be absolute, got "{set_ones["job_dir"]}"')
    return run.Config(run.SSHTunnel, **set_ones)


def _environment(
    env: dict[str, str], stop_seconds: int, cpus: int | None, devices: int, here: bool, shipped: bool
) -> dict[str, str]:
    """Values as the shell is to read them: NeMo-Run quotes nothing."""
    for name in env:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # NeMo-Run writes every name in capitals
            raise ValueError(f'run.executor.env: "{name}" is not in capitals; export it in run.executor.setup')
    values = {name: shlex.quote(str(value)) for name, value in {**ENVIRONMENT, **env}.items()}
    values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(max(stop_seconds, 30))  # or torchrun kills ranks that still save
    if cpus:
        values["SRUN_CPUS_PER_TASK"] = str(cpus * devices)  # srun does not take it from sbatch since SLURM 22.05
    if here and "PATH" not in env:  # torchrun is looked up there; a venv can be used without being activated
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    if shipped:
        values["PYTHONPATH"] = f"{SHIPPED}:{values.get('PYTHONPATH', '$PYTHONPATH')}"
    return values

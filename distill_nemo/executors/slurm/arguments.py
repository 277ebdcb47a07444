"""Arguments of the SLURM executor, in terms that a cluster's users know; `--dryrun` prints the resulting script."""

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
from distill_nemo.fields import suggest, typed

PACKAGERS = ("none", "git")
JOB_NAME_PREFIX = "distill."  # NeMo-Run takes what follows the last dot of a job's name in accounting for the name
SHIPPED = "/nemo_run/code"  # NeMo-Run's path of shipped code; without a container it substitutes the real path
# Jobs that share a node need different ports. NeMo-Run writes this into the script and the shell computes it.
PORT = "$((20000+SLURM_JOB_ID%10000))"
QUIET = "{ set +vx; } 2>/dev/null"  # NeMo-Run's script makes the shell print every line to the log, with its values
ADVICE_ON_SECRETS = (
    "export it before this command, as sbatch passes the environment on; or, with host, in a file on the cluster that "
    "run.executor.setup sources"
)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


class CommittedCode(run.GitArchivePackager):
    """Packager that ships the committed files and warns about the others."""

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write the archive and list uncommitted files on stderr."""
        status = subprocess.run(
            ["git", "-C", path, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
        changed = [line[3:] for line in status.stdout.splitlines()]
        if changed:
            names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            print(f"warning: not shipped, because not committed: {names} ({len(changed)} in total)", file=sys.stderr)
        return super().package(path, job_dir, name)


@typed("run.executor.")
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
        account: account that is charged; None is the user's default.
        partition: partition to queue in; None is the cluster's default.
        nodes: number of nodes.
        devices: ranks per node, one for each GPU.
        gpus: request `devices` GPUs per node; false on CPU nodes and on partitions that allocate whole nodes only.
        cpus_per_device: CPU cores per rank; None leaves it to the cluster, which may give a node's ranks a single core.
        exclusive: share the nodes with no other job.
        time: limit, in one of SLURM's formats: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS.
        stop_seconds: seconds before the limit at which the ranks are told to finish their step, save and end.
        retries: times that SLURM queues a failed or interrupted job again; it resumes from its last checkpoint.
        container_image: Pyxis image; None runs in the environment of this command, or in what `setup` activates.
        container_mounts: SOURCE:TARGET, for the container.
        workdir: directory of the ranks, to which relative paths refer; None is this directory, if the job can see it.
        env: environment of the ranks.
        setup: shell lines to run before the ranks start, such as module load.
        packager: "git" ships the committed code of this repository; "none" uses what is installed on the cluster.
        host: login node to reach over SSH, if this machine is not part of the cluster.
        user: user name on the login node.
        job_dir: directory for scripts and logs on the cluster's file system. With host only; else NEMORUN_HOME.
        identity: file of the SSH key.
        port: port of SSH.

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
        signal=f"URG@{stop_seconds}" if stop_seconds else None,  # runtime/signals.py says why SIGURG
        retries=retries,
        container_image=container_image and shlex.quote(container_image),  # NeMo-Run quotes no argument of srun
        container_mounts=[shlex.quote(mount) for mount in container_mounts or []],
        srun_args=[f"--chdir={workdir}"] if workdir else [],
        env_vars=_environment(env or {}, stop_seconds, cpus_per_device, devices, here, packager == "git"),
        # The empty line is for a last line that ends in a backslash.
        setup_lines="\n".join([QUIET, *setup, "", "set -vx"]) if setup else None,
        packager=run.Config(CommittedCode if packager == "git" else run.Packager),
        launcher=run.Config(run.Torchrun, rdzv_port=PORT, rdzv_backend=_rendezvous(nodes, packager)),
        tunnel=tunnel,
        poll_estimated_start_time=False,
    )


def slurm(*args: Any, **kwargs: Any) -> run.Executor:
    """Return the executor that `run.executor=slurm` names on the command line; takes the same arguments."""
    return fdl.build(slurm_config(*args, **kwargs))


slurm.__signature__ = inspect.signature(slurm_config).replace(return_annotation=run.Executor)  # type: ignore


def _rendezvous(nodes: int, packager: str) -> str:
    """Return the rendezvous backend: ours, or c10d for shipped code, since torchrun finds installed backends only."""
    if packager == "git":
        return "c10d"
    return "loopback" if nodes == 1 else "nodes"


def _check_paths(workdir: str, python: str, container_image: str | None) -> None:
    """Refuse paths that NeMo-Run's scripts would alter."""
    for path in (workdir, python):
        if container_image is None and "/nemo_run" in path:
            raise ValueError(
                f"NeMo-Run replaces /nemo_run in its scripts, so no path may contain it: {path}; rename it"
            )
    if re.search(r"[^\w~@%+=:,./${}-]", workdir):
        raise ValueError(
            f'the job cannot run in "{workdir}": NeMo-Run does not quote run.executor.workdir in its scripts'
        )


def seconds_of(time: str) -> int:
    """Return the seconds of a limit in one of SLURM's formats.

    Raises:
        ValueError: for another format; for 0, which SLURM takes for no limit.
    """
    match = _TIME.fullmatch(str(time))
    if match is None:
        raise ValueError(f'run.executor.time must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, got "{time}"')
    days, parts = match[1], [int(part) for part in match.groups()[1:] if part is not None]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)  # a single number is minutes
    seconds = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if not seconds:
        raise ValueError(f'run.executor.time must be more than 0, got "{time}"')
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
        raise ValueError(
            "run.executor.workdir cannot be used with container_image: in a container, write absolute paths"
        )


def _tunnel(**given: Any) -> run.Config:
    fields = {name: value for name, value in given.items() if value is not None}
    if "host" not in fields:
        if fields:
            raise ValueError(f"run.executor.{next(iter(fields))} needs run.executor.host, the login node")
        return run.Config(run.LocalTunnel, job_dir="")
    for name in ("user", "job_dir"):
        if name not in fields:
            raise ValueError(f"run.executor.host needs {name} too")
    for name in ("host", "user", "identity"):  # NeMo-Run puts them into a shell command, for rsync
        value = fields.get(name, "x")
        if shlex.quote(value) != value or value.startswith("-"):
            raise ValueError(f'run.executor.{name} = "{value}" has characters that NeMo-Run does not quote')
    if not os.path.isabs(fields["job_dir"]):
        raise ValueError(f'run.executor.job_dir must be absolute, got "{fields["job_dir"]}"')
    return run.Config(run.SSHTunnel, **fields)


def _environment(
    env: dict[str, str], stop_seconds: int, cpus: int | None, devices: int, here: bool, shipped: bool
) -> dict[str, str]:
    """Return the ranks' environment, quoted for the shell, since NeMo-Run quotes nothing."""
    for name in env:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # NeMo-Run turns every name into capitals
            raise ValueError(f'run.executor.env: "{name}" is not in capitals; export it in run.executor.setup')
    values = {name: shlex.quote(str(value)) for name, value in {**ENVIRONMENT, **env}.items()}
    values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(max(stop_seconds, 30))  # after it torchrun kills ranks that save
    if cpus:
        values["SRUN_CPUS_PER_TASK"] = str(cpus * devices)  # srun does not take it from sbatch since SLURM 22.05
    if here and "PATH" not in env:  # so that torchrun is found even if the virtual environment is not activated
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    if shipped:
        values["PYTHONPATH"] = f"{SHIPPED}:{values.get('PYTHONPATH', '$PYTHONPATH')}"
    return values

"""From `run.executor=NAME run.executor.FIELD=VALUE` to an executor; what is checked before anything is submitted."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home

from distill_nemo.checks import check
from distill_nemo.cli_values import parse
from distill_nemo.config import RunConfig
from distill_nemo.executors import EXECUTORS, KubernetesExecutor
from distill_nemo.executors.secrets import refuse_secrets
from distill_nemo.executors.slurm import ADVICE_ON_SECRETS, SHIPPED
from distill_nemo.fields import near
from distill_nemo.models.sources import find_checkpoint

SRUN_WORDS = ("container_mounts", "container_env", "srun_args")  # lists of words that go to srun unquoted
LEFT_OUT = (
    "setup_lines",  # the shell would write them to the log, values and all; `setup` does not
    "array",  # a run is one job
    "heterogeneous",
    "dependencies",  # handles of NeMo-Run's; additional_parameters='{"dependency": "afterany:1"}' takes job ids
)


def parse_executor(name: str, arguments: Iterable[str]) -> run.Config:
    """`slurm`, `["nodes=2", "qos=high"]`: arguments of the factory, and fields of NeMo-Run's executor.

    Raises:
        ValueError: for an executor or a field of it that is not known, with the near names, or a value of it that is
            not allowed.
    """
    if name not in EXECUTORS:
        base, called, _ = name.partition("(")
        advice = f" Write run.executor={base} run.executor.FIELD=VALUE." if called else near(base, EXECUTORS)
        raise ValueError(f'run.executor: unknown executor "{name}".{advice}')
    factory = EXECUTORS[name]
    own = typing.get_type_hints(factory)
    cls = typing.get_args(own.pop("return"))[0]
    known = {**own, **_fields(cls)}
    call, others = {}, {}
    for argument in arguments:
        field, _, value = argument.partition("=")
        if field.partition(".")[0] not in known:
            raise ValueError(f'unknown field "run.executor.{field}".{near(field, known)}')
        if field in own:
            call[field] = parse(f"run.executor.{field}", value, own[field])
        else:
            others[field] = value
    config = factory(**call)
    for field, value in others.items():
        set_field("run.executor", config, field, value)
    return config


def _fields(cls: Any) -> dict[str, Any]:
    """Those of NeMo-Run's that may be set, with their types."""
    hints = typing.get_type_hints(cls)
    left_out = (*LEFT_OUT, "env_vars") if cls is run.SlurmExecutor else LEFT_OUT  # `env` is quoted for the script
    return {field: hints.get(field, Any) for field in inspect.signature(cls).parameters if field not in left_out}


def set_field(name: str, config: Any, path: str, value: str) -> None:
    """Set a field. Not by NeMo-Run, whose messages print the whole executor, environment included."""
    *sections, field = path.split(".")
    for section in sections:
        config = config.__arguments__.get(section) if isinstance(config, run.Config) else None
    known = _fields(config.__fn_or_cls__) if isinstance(config, run.Config) else {}
    if field not in known:
        raise ValueError(f'unknown field "{name}.{path}".{near(field, known) if known else " It has no fields."}')
    setattr(config, field, parse(f"{name}.{path}", value, known[field]))


def check_launch(config: RunConfig, executor: run.Executor, dryrun: bool = False) -> None:
    """Refuse what the workers would refuse, as far as it can be known without Megatron: before any process starts.

    Raises:
        ValueError: as `config.check`, with the node counts that would do; for secrets in clear; for checkpoints and
            token files that are not there; for paths that would mean another place in the job; without `sbatch`, or a
            cluster in the kubeconfig.
    """
    if isinstance(executor, KubernetesExecutor):
        executor.check()
    elif isinstance(executor, run.SlurmExecutor):
        refuse_secrets(vars(executor), ADVICE_ON_SECRETS)
        _check_script(executor)
    elif isinstance(executor, run.LocalExecutor):
        refuse_secrets(vars(executor), "export it before this command")
        if executor.nodes != 1:
            raise ValueError(f"run.executor.nodes = {executor.nodes}: this machine is one; processes= are its ranks")
    if executor.nnodes() < 1 or executor.nproc_per_node() < 1:
        raise ValueError(f"run.executor: {executor.nnodes()} nodes x {executor.nproc_per_node()} ranks are none")
    workdir = _workdir(executor)
    if workdir is None:
        slurm = isinstance(executor, run.SlurmExecutor)
        _check_absolute(config, not slurm or executor.container_image is not None)
    elif workdir != "":
        _check_files(config, Path(workdir))
    check_fits_nodes(config, executor)
    if isinstance(executor, KubernetesExecutor):
        _check_mounted(config, executor)
        if not dryrun:
            executor._load_kube_clients()
    if isinstance(executor, run.SlurmExecutor) and isinstance(executor.tunnel, run.LocalTunnel) and not dryrun:
        if shutil.which("sbatch") is None:
            raise ValueError(
                "`sbatch` is not on PATH: type this on a login node of the cluster, or name one with "
                "run.executor.host=, user= and job_dir=; --dryrun shows what would be submitted"
            )


def _check_script(executor: run.SlurmExecutor) -> None:
    """Refuse what would not reach SLURM as typed: NeMo-Run 0.11.1 quotes the values of #SBATCH lines, and no others."""
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
    words = [("container_image", executor.container_image or "x")]
    words += [(name, each) for name in SRUN_WORDS for each in getattr(executor, name) or []]
    for name, value in flags:
        if "\n" in str(value):
            raise ValueError(f"run.executor.{name} has two lines, and in a batch script the second is a command")
    for name, word in words:
        if not _is_one_word(word):
            raise ValueError(
                f"run.executor.{name}: the shell would not read {word} as it is; write {shlex.quote(word)}"
            )
    _check_spoiled(executor, [*flags, *words])


def _is_one_word(text: str) -> bool:
    """True if the shell reads `text` as one word, and as it stands between its quotes, if it has any."""
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return len(words) == 1 and (shlex.quote(words[0]) == text or f"'{words[0]}'" == text)


def _check_spoiled(executor: run.SlurmExecutor, others: list[tuple[str, Any]]) -> None:
    """Refuse set-up lines that are no shell, and a path that NeMo-Run replaces where there is no container."""
    setup = executor.setup_lines or ""
    parsed = subprocess.run(["bash", "-n"], input=setup, capture_output=True, text=True, check=False)
    if parsed.returncode:
        raise ValueError(f"run.executor.setup is not what bash reads: {parsed.stderr.strip().splitlines()[0]}")
    if executor.container_image is None:
        texts = [
            *(("setup", line) for line in setup.splitlines()),
            *others,
            *(("env", value) for value in executor.env_vars.values()),
        ]
        texts += [("job_dir", executor.tunnel.job_dir or get_nemorun_home())]
        for name, text in texts:
            if "/nemo_run" in str(text).replace(SHIPPED, ""):
                raise ValueError(
                    f'run.executor.{name}: NeMo-Run replaces "/nemo_run" in its scripts, so no path may hold it: {text}'
                )


def check_fits_nodes(config: RunConfig, executor: run.Executor) -> None:
    """`checks.check` for the executor's ranks.

    Raises:
        ValueError: as `check`, with the node counts that would do.
    """
    try:
        check(config, executor.nnodes() * executor.nproc_per_node())
    except ValueError as error:
        raise ValueError(f"{error}{_that_fit(config, executor)}") from None


def _workdir(executor: run.Executor) -> str | None:
    """Where the ranks run, if they see this machine's files; "" on another machine, None where it changes each time."""
    if isinstance(executor, run.LocalExecutor):
        return "."
    if not isinstance(executor, run.SlurmExecutor):  # all others are containers
        return None
    given = [value.partition("=")[2] for value in executor.srun_args or [] if value.startswith("--chdir=")]
    if executor.container_image is not None or not given:
        return None
    return given[-1] if isinstance(executor.tunnel, run.LocalTunnel) else ""


def _that_fit(config: RunConfig, executor: run.Executor) -> str:
    """Node counts that would pass; nothing when it is not the number of nodes that is wrong."""
    if isinstance(executor, run.LocalExecutor):
        return ""
    nodes, devices, fitting = executor.nnodes(), executor.nproc_per_node(), []
    most = max(2 * nodes, config.parallelism.model_parallel_size)
    for count in range(1, most + 1):
        try:
            check(config, count * devices)
            fitting.append(count)
        except ValueError:
            continue
    ours = f". You asked for {nodes} nodes x {devices} devices"
    if fitting:
        nearest = sorted(sorted(fitting, key=lambda count: abs(count - nodes))[:5])
        return f"{ours}; with {devices} devices a node, run.executor.nodes = {', '.join(map(str, nearest))} fit"
    return ""


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every path of the config, with its field."""
    yield "output_dir", config.output_dir
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.checkpoint is not None:
            yield f"{role}.checkpoint", model.checkpoint
    for name, values in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        yield from ((name, value) for value in values if not _is_number(value))
    if config.data.tokenizer is not None:
        yield "data.tokenizer", config.data.tokenizer


def _check_absolute(config: RunConfig, in_container: bool) -> None:
    where = "in a container" if in_container else "on another machine"
    advice = "" if in_container else ", or name the directory that it is relative to: run.executor.workdir="
    for name, path in _paths(config):
        if not Path(path).is_absolute():
            raise ValueError(
                f'{name} = "{path}" is relative, and the job runs {where}, in a directory that is new each time: '
                f"write the absolute path that it has there{advice}"
            )


def _check_mounted(config: RunConfig, executor: KubernetesExecutor) -> None:
    where = " or ".join(executor.mounts) or "a volume: run.executor.pvc="
    mounts = tuple(f"{path}/" for path in executor.mounts)
    outside = {name: path for name, path in _paths(config) if not f"{os.path.normpath(path)}/".startswith(mounts)}
    if "output_dir" in outside:
        raise ValueError(
            f'output_dir = "{config.output_dir}" would be lost with the pods: it must be below {where}'
            + ("" if executor.mounts else f", mounted at {executor.mount}")
        )
    if outside:
        said = ", ".join(f"{name} = {path}" for name, path in outside.items())
        print(f"warning: not below {where}, so they must be in the image: {said}", file=sys.stderr)


def _check_files(config: RunConfig, workdir: Path) -> None:
    for name, path in _paths(config):
        if name.endswith(".checkpoint"):
            try:
                find_checkpoint(workdir / path)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif name in ("data.train", "data.valid") and not Path(workdir, f"{path}.idx").is_file():
            raise ValueError(f"{name}: no file {Path(workdir, path)}.idx; make it with `nemo distill prepare`")


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

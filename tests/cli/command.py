"""Run the venv's own `nemo` as a user starts it: by its path, in a process of its own, with no setup around it."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import pytest

BIN = Path(sys.executable).parent
STEPS = 16
PATIENCE = 500.0  # seconds; 25 were measured on two idle cores
KEPT = ("PATH", "PYTHONPATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass
class Ended:
    """Result of a command that has ended."""

    code: int
    out: str
    err: str


class Command:
    """A command that runs in `cwd`, which is also its home. `more` is added to its environment."""

    def __init__(self, arguments, cwd, **more):
        cwd.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        without_venv = [path for path in environment["PATH"].split(os.pathsep) if Path(path) != BIN]
        environment |= {"HOME": f"{cwd}/home", "NEMORUN_HOME": f"{cwd}/home/nemo", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PATH": os.pathsep.join(without_venv), **more}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"cwd": cwd, "env": environment, "start_new_session": True}
        self.began = time.time()
        self.process = subprocess.Popen(list(map(str, arguments)), **pipes, **options)

    def ended(self):
        """Wait for its end. After `PATIENCE`, kill it and all that it started."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            raise
        return Ended(self.process.returncode, out, err)

    def ranks(self):
        """Return the processes of its ranks, by rank."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        of_ranks = [process for process in below if "RANK" in process.environ()]
        helpers = [process for process in of_ranks if process.parent() in of_ranks]
        return {int(process.environ()["RANK"]): process for process in of_ranks if process not in helpers}

    def listening(self):
        """Return the addresses at which the command and all that it started listen now, according to the kernel."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        found = [each for process in processes for each in process.net_connections("inet")]
        return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM}

    def at_step(self, output, step):
        """Wait until this command, and no earlier one, has written `step` to `metrics.jsonl` in `output`."""
        while (last_step(output, self.began) or 0) < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.time() < self.began + PATIENCE
            time.sleep(0.02)
        return self

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)


def nemo(*arguments, cwd, **more):
    """Run `nemo distill ARGUMENTS` to its end."""
    return start(*arguments, cwd=cwd, **more).ended()


def start(*arguments, cwd, **more):
    """Start `nemo distill ARGUMENTS`."""
    return Command([BIN / "nemo", "distill", *arguments], cwd, **more)


def together(*calls):
    """Return the results of `calls`, run two at a time: a command is mostly one process."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def last_step(output, since=0.0):
    """Return the last step in `metrics.jsonl`; None if there is none, or it was not written after `since`."""
    path = Path(output) / "metrics.jsonl"
    try:
        return json.loads(path.read_text().splitlines()[-1])["step"] if path.stat().st_mtime > since else None
    except (OSError, IndexError, ValueError):
        return None


def shrunk(inputs, **others):
    """Return overrides that shrink a full-size recipe onto tiny models and token files in `inputs`, tensor parallel 2.

    `others` are further overrides, `section__field=value`.
    """
    fields = {
        "teacher.checkpoint": inputs / "teacher",
        "student.checkpoint": inputs / "student",
        "data.train": json.dumps([str(inputs / "train")]),
        "data.valid": json.dumps([str(inputs / "valid")]),
        "data.tokenizer": inputs / "tokenizer",
        "data.sequence_length": 32,
        "optimizer.warmup_steps": 2,
        "parallelism.tensor_model_parallel_size": 2,
        "parallelism.sequence_parallel": "true",
        "training.steps": STEPS,
        "training.micro_batch_size": 1,
        "training.global_batch_size": 2,
        "training.eval_interval": 4,
        "training.eval_batches": 1,
        "checkpoint.save_interval": 4,
        "logging.log_interval": 1,
    }
    fields |= {name.replace("__", "."): value for name, value in others.items()}
    return [f"{name}={value}" for name, value in fields.items()]


TWO_RANKS = ("run.executor=local", "run.executor.processes=2")


def nemo_forked(process, *arguments, cwd):
    """Run `nemo distill ARGUMENTS` in a process of `tests.spawn.Gloo`, which has imported what the command needs."""
    return Ended(*process.run(_nemo_of_a_process, cwd, arguments)[0])


def _nemo_of_a_process(cwd, arguments):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # it is no rank of a run
    ours = {name: os.environ.pop(name, None) for name in names}
    os.chdir(cwd)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _exit_code(arguments)
    finally:
        os.environ.update({name: value for name, value in ours.items() if value is not None})
    return code, out.getvalue(), err.getvalue()


def _exit_code(arguments):
    the_recipes()
    from nemo_run.cli.api import create_cli
    from typer.main import get_command

    with mock.patch.object(sys, "argv", ["nemo", "distill", *arguments]), pytest.raises(SystemExit) as ended:
        get_command(create_cli()).main(sys.argv[1:], prog_name="nemo")
    return ended.value.code


def the_recipes():
    """Import the package `recipes`, without warnings from NeMo-Run's imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import recipes
    return recipes


def nemo_home(monkeypatch, path):
    """Set NeMo-Run's home for `nemo_here`. NeMo-Run reads NEMORUN_HOME once, when it is imported."""
    the_recipes()
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(path))


def nemo_here(capfd, *arguments):
    """Run `nemo distill ARGUMENTS`, one that starts nothing, in this process: it saves four seconds."""
    return Ended(_exit_code(arguments), *capfd.readouterr())

"""Where a recipe runs, and what is seen of it. SLURM and Kubernetes follow in a later release."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import psutil

_ENVIRONMENT = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # torchrun sets 1 too, and warns about it
    "LOGLEVEL": os.environ.get("LOGLEVEL", "ERROR"),  # NeMo-Run would have torchrun tell its own every step
}
_ERROR = re.compile(r"^error( on rank \d+)?: .*", re.M | re.S)
# torchrun's own words: how each rank ended, and which ones it ended itself because of that
_ENDED = re.compile(r"rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+) +\(pid: (\d+)\)")
_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.M)


@run.cli.factory(name="local", target=run.Executor)
def local_config(processes: int = 1) -> run.Config[run.LocalExecutor]:
    """This machine, `processes` ranks under torchrun: one per GPU, where there are GPUs."""
    if processes < 1:
        raise ValueError(f"run.executor.processes must be at least 1, got {processes}")
    # torchrun is looked up on PATH, where it need not be: a venv can be used without being activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return run.Config(
        run.LocalExecutor, ntasks_per_node=processes, launcher="torchrun", env_vars={"PATH": path, **_ENVIRONMENT}
    )


EXECUTORS = {"local": local_config}  # what `run.executor=` may name


def local(processes: int = 1) -> run.Executor:
    """The executor that `run.executor=local` names on the command line, for Python."""
    return fdl.build(local_config(processes))


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


class Stages(run.Experiment):
    """Tasks of which one sees what their ranks say, and that exit 1 at the first that fails.

    NeMo-Run itself would go on after a failure and exit 0, and tells every step of its own.
    """

    @classmethod
    def titled(cls, title: str) -> "Stages":
        """Without NeMo-Run's own words."""
        return cls(title, clean_mode=True, enable_goodbye_message=False, log_level="ERROR")

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        for job in jobs:
            print(f"{job.id}: started; logs in {job.executor.job_dir}", flush=True)
        out: Any = _RankLines(sys.stdout, jobs)
        with contextlib.redirect_stdout(out):
            super()._wait_for_jobs(jobs)
        for job in jobs:
            if str(job.state) != "SUCCEEDED":
                print(f"{job.id}: {job.state}; logs in {job.executor.job_dir}", file=sys.stderr)
                print(why_it_ended(Path(job.executor.job_dir)), file=sys.stderr)
                sys.exit(1)


class _RankLines:
    """Standard output while NeMo-Run prints the logs of `jobs` to it: what the ranks said, as they said it.

    Tracebacks stay in the logs (torchrun adds one about itself to every failure), and so does a rank's own error, which
    `Stages` repeats on stderr.
    """

    def __init__(self, out: Any, jobs: list[Any]) -> None:
        self._out = out
        self._hiding: dict[int, str] = {}  # rank -> what of its is not shown now
        self._torchrun = {job.id[-10:]: isinstance(job.executor.get_launcher(), run.Torchrun) for job in jobs}
        names = "|".join(map(re.escape, self._torchrun))
        self._of_job = re.compile(rf"(?:\x1b\[\d+m)?({names})/\d+(?:\x1b\[0?m)? ")
        self._of_rank = re.compile(r"\[default(\d+)\]:(?:\[rank\d+\]: ?)?(.*)", re.S)  # torchrun's mark, torch's own

    def write(self, text: str) -> int:
        job = self._of_job.match(text)
        line = self._of_job.sub("", text) if job else text
        if job and self._torchrun[job[1]]:
            said = self._of_rank.fullmatch(line)
            line = self._said(int(said[1]), said[2]) if said else ""
        elif job:
            line = self._said(0, line)
        self._out.write(line)
        return len(text)

    def _said(self, rank: int, line: str) -> str:
        if _ERROR.match(line):
            self._hiding[rank] = "error"
        elif line.startswith("Traceback (most recent call last):"):
            self._hiding.setdefault(rank, "traceback")
        elif self._hiding.get(rank) == "traceback" and line.strip() and not line[0].isspace():
            del self._hiding[rank]  # the exception itself
        return "" if rank in self._hiding else f"rank {rank}: {line}" if rank else line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def why_it_ended(job_dir: Path) -> str:
    """`error: ...` of a task that failed: a rank was killed, or what a rank said, or at least its last words.

    The ranks beside one that was killed lose their connections and say so, which is true but not the reason.
    """
    logs = {path: path.read_text(errors="replace") for path in sorted(job_dir.rglob("stderr.log"))}
    everything = "\n".join(logs.values())
    closed = _CLOSED.findall(everything)
    ended = [(rank, local, int(code)) for rank, local, code, pid in _ENDED.findall(everything) if pid not in closed]
    for rank, _, code in ended:
        if code < 0:
            name = signal.Signals(-code).name
            memory = " (perhaps because memory ran out)" if code == -signal.SIGKILL else ""
            return f"error: rank {rank} was killed by {name}{memory}; the same command goes on from the last checkpoint"
    for text in logs.values():
        if said := _ERROR.search(text):
            return said.group().rstrip()
    for rank, local_rank, code in ended:
        own = "".join(text for path, text in logs.items() if path.match(f"attempt_*/{local_rank}/stderr.log"))
        return f"error: rank {rank} ended with exit code {code}: {_last_words(own)}"
    return f"error: {_last_words(everything)}"


def _last_words(text: str) -> str:
    lines = _EXCEPTION.findall(text) or text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")


@contextlib.contextmanager
def passing_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the ranks, which write a checkpoint and end.

    NeMo-Run starts local jobs in sessions of their own, where a terminal's Ctrl-C does not come, and when it is itself
    terminated it leaves them running.
    """

    def stop(signum: int, frame: Any) -> None:
        children = psutil.Process().children()
        if children:
            print("stopping: waiting for the checkpoint; the same command resumes", file=sys.stderr)
        for child in children:
            child.terminate()
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

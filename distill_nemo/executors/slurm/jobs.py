"""State, output and end of jobs on a SLURM cluster.

The state comes from `scontrol`, which is always current, or from accounting once SLURM has forgotten the job. NeMo-Run
queries accounting only, shows the first attempt's log only, and gives up on a job that it cannot see.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invoke.exceptions import Failure, ThreadException
from paramiko import SSHException

from distill_nemo.executors.watch.endings import RESUME, why_a_log_ended
from distill_nemo.executors.watch.jobs import ClusterJob, UnseenError
from distill_nemo.executors.watch.screen import RankLines

ENDED_STATES = (
    "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE REVOKED LAUNCH_FAILED"
).split()
_ACCOUNTED = "State,ExitCode,Elapsed,Timelimit,NodeList,Reason"  # SLURM 22.05's accounting has no Restarts


@dataclass
class State:
    """State of a job at one moment."""

    name: str  # SLURM's, such as RUNNING
    reason: str
    elapsed: str
    limit: str
    nodes: str
    exit_code: str  # CODE:SIGNAL of the batch script
    restarts: str = ""

    @property
    def ended(self) -> bool:
        """True when the job is over."""
        return self.name in ENDED_STATES

    @property
    def completed(self) -> bool:
        """True when the job succeeded."""
        return self.name == "COMPLETED"

    @property
    def waits(self) -> str:
        """Reason that the job does not run yet."""
        return self.reason if self.name == "PENDING" and self.reason != "None" else ""

    @property
    def stuck(self) -> bool:
        """Always False: limits and reservations change, so no SLURM reason is final."""
        return False

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes not in ("", "(null)", "None assigned") else ""
        why = f" ({self.waits})" if self.waits else ""
        again = f", started again {self.restarts} times" if self.restarts not in ("", "0") else ""
        return f"{self.name}{why}{where}, {self.elapsed} of {self.limit}{again}"


@dataclass
class SlurmJob(ClusterJob):
    """One submitted job, reached through NeMo-Run's tunnel: this machine or a login node."""

    name: str
    id: str
    tunnel: Any
    folder: str  # holds its logs, on the cluster
    one_node: bool = True
    _read: dict[str, int] = field(default_factory=dict)  # log -> lines read
    _lines: dict[str, RankLines] = field(default_factory=dict)  # log -> filter for the screen

    @classmethod
    def of(cls, job: Any) -> "SlurmJob":
        """Wrap a NeMo-Run job."""
        executor = job.executor
        folder = f"{executor.tunnel.job_dir}/{Path(executor.job_dir).name}"
        return cls(job.id, job.handle.rpartition("/")[2], executor.tunnel, folder, executor.nnodes() == 1)

    def state(self) -> State:
        """Return the job's state.

        Raises:
            UnseenError: if neither SLURM nor its accounting knows the job.
        """
        shown = self._run(f"scontrol show job --oneliner {self.id}")
        if shown.ok and shown.stdout.startswith("JobId="):
            fields = dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))
            names = ("JobState", "Reason", "RunTime", "TimeLimit", "NodeList", "ExitCode", "Restarts")
            return State(*(fields.get(name, "") for name in names))
        accounted = self._run(f"sacct -X -n -P -j {self.id} -o {_ACCOUNTED}")
        lines = accounted.stdout.splitlines() if accounted.ok else []
        if not lines:
            message = (shown.stderr.strip() or accounted.stderr.strip() or "no such job").splitlines()[-1]
            raise UnseenError(f"SLURM does not show job {self.id}: {message}")
        state, exit_code, elapsed, limit, nodes, reason = lines[-1].split("|")
        return State(state.split()[0], reason, elapsed, limit, nodes, exit_code)

    def logs(self) -> list[str]:
        """Return the job's log files, one for each attempt."""
        listed = self._run(f"ls -1 {shlex.quote(self.folder)}/log-*_{self.id}_*.out")
        return sorted(listed.stdout.split("\n")[:-1] if listed.ok else [], key=lambda path: (len(path), path))

    def new_text(self) -> Iterator[str]:
        """Return the complete lines that were added to the logs since the last call."""
        return map(self._new, self.logs())

    def new_shown(self) -> Iterator[str]:
        """Return the ranks' output since the last call, filtered for the screen."""
        before = ""
        for path in self.logs():
            if path not in self._lines:
                if before:
                    why = _reason(self._text(before)).removeprefix("error: ")
                    yield f"{self.name}: job {self.id} was started again: {why}\n"
                self._lines[path] = RankLines(torchrun=True, one_node=self.one_node)
            yield from map(self._lines[path].shown, re.findall(r".*\n", self._new(path)))
            before = path

    def _new(self, path: str) -> str:
        begin = self._read.get(path, 0)
        text = self._run(f"tail -n +{begin + 1} {shlex.quote(path)}").stdout
        whole = text[: text.rfind("\n") + 1]
        self._read[path] = begin + whole.count("\n")
        return whole

    def _text(self, path: str) -> str:
        return self._run(f"cat {shlex.quote(path)}").stdout

    def why(self, state: State) -> str:
        """Return the `error: ...` of a job that did not complete."""
        try:
            return self._why(state)
        except UnseenError as error:
            return f"error: the logs with the reason cannot be read: {error}"

    def _why(self, state: State) -> str:
        logs = self.logs()
        log = self._text(logs[-1]) if logs else ""
        if state.name == "TIMEOUT":
            return f"error: it reached its time limit of {state.limit}; {self._resumes(log)}"
        if state.name in ("CANCELLED", "PREEMPTED", "DEADLINE"):
            return f"error: SLURM ended it ({state.name}) after {state.elapsed}; {self._resumes(log)}"
        if state.name in ("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"):
            return f"error: {state.name} on {state.nodes} after {state.elapsed}; {self._resumes(log)}"
        if not log.strip():
            output = self._run(f"tail -n 20 {shlex.quote(self.folder)}/sbatch_*_{self.id}.out").stdout.strip()
            return f"error: no rank started, exit code {state.exit_code}: {output.splitlines()[-1] if output else ''}"
        return f"error: {_reason(log)}; {self._resumes(log)}" if _stopped_on_request(log) else _reason(log)

    def _resumes(self, log: str) -> str:
        saved = "checkpoint written" in log
        return f"{'its ranks had saved; ' if saved else ''}{RESUME}"

    def _run(self, command: str) -> Any:
        try:
            return self.tunnel.run(command, warn=True, in_stream=False)  # keeps the terminal's input from `command`
        except (OSError, EOFError, SSHException, Failure, ThreadException) as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UnseenError(f"{self.tunnel.host} does not answer: {message}") from None
        except SystemExit as error:
            if error.code != 1:  # raised by a signal handler, not by NeMo-Run
                raise
            raise UnseenError(f"no connection to {self.tunnel.user}@{self.tunnel.host}") from None

    def cancel(self) -> None:
        """Cancel the job.

        Raises:
            RuntimeError: if SLURM refuses, with its message.
        """
        result = self._run(f"scancel {self.id}")
        if not result.ok:
            raise RuntimeError(f"job {self.id} could not be cancelled: {result.stderr.strip()}")


def _stopped_on_request(log: str) -> bool:
    return "; the same command resumes" in log


def _reason(log: str) -> str:
    """Return why an attempt ended."""
    if _stopped_on_request(log):
        return "it was told to stop, by the time limit or for another job"
    return why_a_log_ended(log)

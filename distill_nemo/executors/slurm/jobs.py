"""Jobs on a SLURM cluster: how they are, what they say, and their end.

Asked of `scontrol`, which is never behind, and of accounting when SLURM has forgotten the job. NeMo-Run asks accounting
only, shows the first attempt's log only, and leaves a job that it cannot see.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invoke.exceptions import Failure, ThreadException
from paramiko import SSHException

from distill_nemo.executors.watch.endings import why_a_log_ended
from distill_nemo.executors.watch.jobs import ClusterJob, UnseenError
from distill_nemo.executors.watch.screen import RankLines

ENDED = (
    "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE REVOKED LAUNCH_FAILED"
).split()
_ACCOUNTED = "State,ExitCode,Elapsed,Timelimit,NodeList,Reason"  # Restarts is unknown to SLURM 22.05's


@dataclass
class State:
    """A job now."""

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
        return self.name in ENDED

    @property
    def completed(self) -> bool:
        """True when the job succeeded."""
        return self.name == "COMPLETED"

    @property
    def waits(self) -> str:
        """Why it does not run yet."""
        return self.reason if self.name == "PENDING" and self.reason != "None" else ""

    @property
    def stuck(self) -> bool:
        """SLURM does not say so: limits and reservations change."""
        return False

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes not in ("", "(null)", "None assigned") else ""
        why = f" ({self.waits})" if self.waits else ""
        again = f", started again {self.restarts} times" if self.restarts not in ("", "0") else ""
        return f"{self.name}{why}{where}, {self.elapsed} of {self.limit}{again}"


@dataclass
class SlurmJob(ClusterJob):
    """One submitted job, seen through NeMo-Run's tunnel: this machine or a login node."""

    name: str
    id: str
    tunnel: Any
    folder: str  # of its logs, on the cluster
    one_node: bool = True
    _read: dict[str, int] = field(default_factory=dict)  # log -> lines shown
    _lines: dict[str, RankLines] = field(default_factory=dict)  # log -> what hides some of them

    @classmethod
    def of(cls, job: Any) -> "SlurmJob":
        """The one behind a NeMo-Run job."""
        executor = job.executor
        folder = f"{executor.tunnel.job_dir}/{Path(executor.job_dir).name}"
        return cls(job.id, job.handle.rpartition("/")[2], executor.tunnel, folder, executor.nnodes() == 1)

    def state(self) -> State:
        """Return the job's state.

        Raises:
            UnseenError: when neither SLURM nor its accounting knows.
        """
        told = self._run(f"scontrol show job --oneliner {self.id}")
        if told.ok and told.stdout.startswith("JobId="):
            fields = dict(re.findall(r"(\S+?)=(\S*)", told.stdout))
            names = ("JobState", "Reason", "RunTime", "TimeLimit", "NodeList", "ExitCode", "Restarts")
            return State(*(fields.get(name, "") for name in names))
        accounted = self._run(f"sacct -X -n -P -j {self.id} -o {_ACCOUNTED}")
        lines = accounted.stdout.splitlines() if accounted.ok else []
        if not lines:
            said = (told.stderr.strip() or accounted.stderr.strip() or "no such job").splitlines()[-1]
            raise UnseenError(f"SLURM does not show job {self.id}: {said}")
        state, exit_code, elapsed, limit, nodes, reason = lines[-1].split("|")
        return State(state.split()[0], reason, elapsed, limit, nodes, exit_code)

    def logs(self) -> list[str]:
        """Return the job's log files, one for each attempt."""
        listed = self._run(f"ls -1 {shlex.quote(self.folder)}/log-*_{self.id}_*.out")
        return sorted(listed.stdout.split("\n")[:-1] if listed.ok else [], key=lambda path: (len(path), path))

    def new_text(self) -> Iterator[str]:
        """Return the lines that the logs have gained since the last call, whole ones only."""
        return map(self._new, self.logs())

    def new_shown(self) -> Iterator[str]:
        """Return the ranks' output since the last call, as it is shown."""
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
        """`error: ...` of a job that did not complete."""
        try:
            return self._why(state)
        except UnseenError as error:
            return f"error: the logs that say why are not seen: {error}"

    def _why(self, state: State) -> str:
        logs = self.logs()
        log = self._text(logs[-1]) if logs else ""
        if state.name == "TIMEOUT":
            return f"error: it ran into its time limit of {state.limit}; {self._goes_on(log)}"
        if state.name in ("CANCELLED", "PREEMPTED", "DEADLINE"):
            return f"error: SLURM ended it ({state.name}) after {state.elapsed}; {self._goes_on(log)}"
        if state.name in ("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"):
            return f"error: {state.name} on {state.nodes} after {state.elapsed}; {self._goes_on(log)}"
        if not log.strip():
            said = self._run(f"tail -n 20 {shlex.quote(self.folder)}/sbatch_*_{self.id}.out").stdout.strip()
            return f"error: no rank started, exit code {state.exit_code}: {said.splitlines()[-1] if said else ''}"
        return f"error: {_reason(log)}; {self._goes_on(log)}" if _told_to_stop(log) else _reason(log)

    def _goes_on(self, log: str) -> str:
        saved = "checkpoint written" in log
        return f"{'its ranks had saved; ' if saved else ''}the same command goes on from the last checkpoint"

    def _run(self, command: str) -> Any:
        try:
            return self.tunnel.run(command, warn=True, in_stream=False)  # the terminal's input is not for `command`
        except (OSError, EOFError, SSHException, Failure, ThreadException) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UnseenError(f"{self.tunnel.host} does not answer: {said}") from None
        except SystemExit as error:
            if error.code != 1:  # a signal's
                raise
            raise UnseenError(f"no connection to {self.tunnel.user}@{self.tunnel.host}") from None

    def cancel(self) -> None:
        """End it.

        Raises:
            RuntimeError: in SLURM's words, when it does not.
        """
        told = self._run(f"scancel {self.id}")
        if not told.ok:
            raise RuntimeError(f"job {self.id} could not be cancelled: {told.stderr.strip()}")


def _told_to_stop(log: str) -> bool:
    return "checkpoint written; the same command resumes" in log


def _reason(log: str) -> str:
    """Why an attempt ended."""
    return "it was told to stop, by the time limit or for another job" if _told_to_stop(log) else why_a_log_ended(log)

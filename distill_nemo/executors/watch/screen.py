"""Filter of a job's output: the lines of its ranks that are shown while it runs."""

import re
from typing import Any

import nemo_run as run

# Up to the next rank's, where nodes share a log: it waits for rank 0, but a slow machine may not end it in time.
ERROR = re.compile(r"^error(?: on rank \d+)?: .*?(?=\nerror on rank \d+: |\Z)", re.M | re.S)
GLOO = "[Gloo] Rank "  # torch before 2.11 prints how many peers each group has
_OF_RANK = re.compile(r"\[default(\d+)\]:(?:\[rank\d+\]: ?)*(.*)", re.S)  # torchrun's mark; torch's, once a group


class RankLines:
    """The lines of one job, as its ranks said them.

    Tracebacks stay in the logs (torchrun adds one about itself to every failure), and so does a rank's own error, which
    `WatchedExperiment` repeats on stderr.
    """

    def __init__(self, torchrun: bool, one_node: bool = True, first_rank: int = 0) -> None:
        self._torchrun, self._one_node, self._first_rank = torchrun, one_node, first_rank
        self._hiding: dict[int, str] = {}  # rank -> what of its is not shown now

    def shown(self, line: str) -> str:
        """`line` of the log as it is shown; empty when it is not."""
        if not self._torchrun:
            return self._said(0, line)
        said = _OF_RANK.fullmatch(line)
        return self._said(int(said[1]), said[2]) if said else ""

    def _said(self, rank: int, line: str) -> str:
        if ERROR.match(line):
            self._hiding[rank] = "error"
        elif line.startswith("Traceback (most recent call last):"):
            self._hiding.setdefault(rank, "traceback")
        elif self._hiding.get(rank) == "traceback" and line.strip() and not line[0].isspace():
            del self._hiding[rank]  # the exception itself
        if rank in self._hiding or line.startswith(GLOO):
            return ""
        rank += self._first_rank
        return f"rank {rank}: {line}" if rank and self._one_node else line  # torchrun numbers a node's own ranks


class JobOutput:
    """Standard output while NeMo-Run prints the logs of local `jobs` to it."""

    def __init__(self, out: Any, jobs: list[Any]) -> None:
        self._out = out
        self._lines = {job.id[-10:]: RankLines(isinstance(job.executor.get_launcher(), run.Torchrun)) for job in jobs}
        names = "|".join(map(re.escape, self._lines))
        self._of_job = re.compile(rf"(?:\x1b\[\d+m)?({names})/\d+(?:\x1b\[0?m)? ")

    def write(self, text: str) -> int:
        """Write `text`, or what is shown of it."""
        job = self._of_job.match(text)
        self._out.write(self._lines[job[1]].shown(self._of_job.sub("", text)) if job else text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

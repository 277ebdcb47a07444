"""Filter for a job's output: which lines of its ranks the screen shows."""

import re
from typing import Any

import nemo_run as run

# Ends before the next rank's error: in a shared log, ranks that torchrun did not stop in time print theirs too.
ERROR = re.compile(r"^error(?: on rank \d+)?: .*?(?=\nerror on rank \d+: |\Z)", re.M | re.S)
GLOO = "[Gloo] Rank "  # torch before 2.11 prints how many peers each group has
_OF_RANK = re.compile(r"\[default(\d+)\]:(?:\[rank\d+\]: ?)*(.*)", re.S)  # torchrun's mark, then torch's marks


class RankLines:
    """Filter for the lines of one job.

    Tracebacks stay in the logs, as torchrun adds one of its own to every failure. So does a rank's error, since
    `WatchedExperiment` repeats it on stderr.
    """

    def __init__(self, torchrun: bool, one_node: bool = True, first_rank: int = 0) -> None:
        self._torchrun, self._one_node, self._first_rank = torchrun, one_node, first_rank
        self._hiding: dict[int, str] = {}  # rank -> "error" or "traceback" while that is being hidden

    def shown(self, line: str) -> str:
        """Return the text to show for a `line` of the log; empty to hide it."""
        if not self._torchrun:
            return self._filter(0, line)
        marked = _OF_RANK.fullmatch(line)
        return self._filter(int(marked[1]), marked[2]) if marked else ""

    def _filter(self, rank: int, line: str) -> str:
        if ERROR.match(line):
            self._hiding[rank] = "error"
        elif line.startswith("Traceback (most recent call last):"):
            self._hiding.setdefault(rank, "traceback")
        elif self._hiding.get(rank) == "traceback" and line.strip() and not line[0].isspace():
            del self._hiding[rank]  # the exception, after its traceback
        if rank in self._hiding or line.startswith(GLOO):
            return ""
        rank += self._first_rank
        return f"rank {rank}: {line}" if rank and self._one_node else line  # torchrun's marks are local ranks


class JobOutput:
    """Standard output that filters the logs of local `jobs`, which NeMo-Run prints to it."""

    def __init__(self, out: Any, jobs: list[Any]) -> None:
        self._out = out
        self._lines = {job.id[-10:]: RankLines(isinstance(job.executor.get_launcher(), run.Torchrun)) for job in jobs}
        names = "|".join(map(re.escape, self._lines))
        self._of_job = re.compile(rf"(?:\x1b\[\d+m)?({names})/\d+(?:\x1b\[0?m)? ")

    def write(self, text: str) -> int:
        """Write `text`; of a job's log, only what is to be shown."""
        job = self._of_job.match(text)
        self._out.write(self._lines[job[1]].shown(self._of_job.sub("", text)) if job else text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

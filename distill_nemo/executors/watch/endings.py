"""Why a task ended: one `error:` line out of its logs."""

import re
import signal
from pathlib import Path

from distill_nemo.executors.watch.screen import ERROR

# torchrun's own words: how each rank ended, and which ones it ended itself because of that
_ENDED = re.compile(r"rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+) +\(pid: (\d+)\)")
_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.M)
_PERHAPS = {"SIGKILL": "memory ran out", "SIGBUS": "a file was cut short while it was read"}
_MARKS = re.compile(r"\[default(\d+)\]:(?:\[rank(\d+)\]: ?)?")  # the node's own rank; torch's, which is everybody's


def why_it_ended(job_dir: Path) -> str:
    """`error: ...` of a local task that failed, out of the log of each rank."""
    logs = {path: path.read_text(errors="replace") for path in sorted(job_dir.rglob("stderr.log"))}
    of_ranks: dict[int, str] = {}
    for path, text in logs.items():
        if path.parent.name.isdigit() and path.match("attempt_*/*/stderr.log"):
            of_ranks[int(path.parent.name)] = of_ranks.get(int(path.parent.name), "") + text
    everything = "\n".join(logs.values())
    ended = [(rank, code, of_ranks.get(local_rank, "")) for rank, local_rank, code in _ended(everything)]
    return _why(everything, ended, list(logs.values()))


def why_a_log_ended(log: str, first_rank: int = 0) -> str:
    """`error: ...` of a task whose nodes write to one log."""
    return why_nodes_ended([(first_rank, log)])


def why_nodes_ended(logs: list[tuple[int, str]]) -> str:
    """`error: ...` of a task out of the log of each node, which begins at this rank."""
    said: list[tuple[int, str, str]] = []  # by node and its own rank; by torch's mark, "" without; a line
    rest, ended = [], []
    for first_rank, log in logs:
        ended += _ended(log, first_rank)
        for line in log.split("\n"):
            if marks := _MARKS.match(line):
                said.append((first_rank + int(marks[1]), marks[2] or "", line[marks.end() :]))
            else:
                rest.append(line)
    of_ranks: dict[tuple[int, str], str] = {}
    for local_rank, rank, line in said:
        of_ranks[local_rank, rank] = of_ranks.get((local_rank, rank), "") + line + "\n"

    def words(rank: str, local_rank: int) -> str:
        return "\n".join(line for local, own, line in said if own == rank or (not own and local == local_rank))

    everything = "\n".join([*of_ranks.values(), *rest])
    return _why(everything, [(rank, code, words(rank, at)) for rank, at, code in ended], list(of_ranks.values()))


def _ended(text: str, first_rank: int = 0) -> list[tuple[str, int, int]]:
    """Ranks that ended by themselves, in torchrun's words: the rank, the one its output has, its exit code."""
    closed = _CLOSED.findall(text)
    return [
        (rank, first_rank + int(local), int(code))
        for rank, local, code, pid in _ENDED.findall(text)
        if pid not in closed
    ]


def _why(everything: str, ended: list[tuple[str, int, str]], logs: list[str]) -> str:
    """A rank (`ended`: with its exit code and words) was killed, or what a rank said, or at least its last words.

    The ranks beside one that was killed lose their connections and say so, which is true but not the reason.
    """
    for rank, code, _ in ended:
        if code < 0:
            name = signal.Signals(-code).name
            why = f" (perhaps because {_PERHAPS[name]})" if name in _PERHAPS else ""
            return f"error: rank {rank} was killed by {name}{why}; the same command goes on from the last checkpoint"
    for text in logs:
        if said := ERROR.search(text):
            return said.group().rstrip()
    for rank, code, words in ended:
        return f"error: rank {rank} ended with exit code {code}: {_last_words(words)}"
    return f"error: {_last_words(everything)}"


def _last_words(text: str) -> str:
    if exceptions := _EXCEPTION.findall(text):
        return exceptions[-1].strip()
    last = text.strip().rpartition("\n")[2].strip()
    return f"it left no message after: {last}" if last else "it left no message"

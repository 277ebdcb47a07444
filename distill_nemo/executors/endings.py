"""Why a task ended: one `error:` line out of its logs."""

import re
import signal
from pathlib import Path

from distill_nemo.executors.screen import ERROR

# torchrun's own words: how each rank ended, and which ones it ended itself because of that
_ENDED = re.compile(r"rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+) +\(pid: (\d+)\)")
_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.M)
_PERHAPS = {"SIGKILL": "memory ran out", "SIGBUS": "a file was cut short while it was read"}
_MARK = re.compile(r"^\[default(\d+)\]:", re.M)


def why_it_ended(job_dir: Path) -> str:
    """`error: ...` of a local task that failed, out of the log of each rank."""
    logs = {path: path.read_text(errors="replace") for path in sorted(job_dir.rglob("stderr.log"))}
    of_ranks: dict[int, str] = {}
    for path, text in logs.items():
        if path.parent.name.isdigit() and path.match("attempt_*/*/stderr.log"):
            of_ranks[int(path.parent.name)] = of_ranks.get(int(path.parent.name), "") + text
    everything = "\n".join(logs.values())
    return _why(everything, _ended(everything), list(logs.values()), of_ranks)


def why_a_log_ended(log: str, first_rank: int = 0) -> str:
    """`error: ...` of a task whose nodes write to one log, where torchrun marks each line with the node's own rank."""
    return why_nodes_ended([(first_rank, log)])


def why_nodes_ended(logs: list[tuple[int, str]]) -> str:
    """`error: ...` of a task out of the log of each node, which begins at this rank."""
    of_ranks: dict[int, str] = {}
    rest, ended = [], []
    for first_rank, log in logs:
        ended += _ended(log, first_rank)
        for line in log.splitlines():
            if mark := _MARK.match(line):
                said = re.sub(r"^\[rank\d+\]: ?", "", line[mark.end() :])
                rank = first_rank + int(mark[1])
                of_ranks[rank] = of_ranks.get(rank, "") + said + "\n"
            else:
                rest.append(line)
    return _why("\n".join([*of_ranks.values(), *rest]), ended, list(of_ranks.values()), of_ranks)


def _ended(text: str, first_rank: int = 0) -> list[tuple[str, int, int]]:
    """Ranks that ended by themselves, in torchrun's words: the rank, the one its output has, its exit code."""
    closed = _CLOSED.findall(text)
    return [
        (rank, first_rank + int(local), int(code))
        for rank, local, code, pid in _ENDED.findall(text)
        if pid not in closed
    ]


def _why(everything: str, ended: list[tuple[str, int, int]], logs: list[str], of_ranks: dict[int, str]) -> str:
    """A rank was killed, or what a rank said, or at least its last words.

    The ranks beside one that was killed lose their connections and say so, which is true but not the reason.
    """
    for rank, _, code in ended:
        if code < 0:
            name = signal.Signals(-code).name
            why = f" (perhaps because {_PERHAPS[name]})" if name in _PERHAPS else ""
            return f"error: rank {rank} was killed by {name}{why}; the same command goes on from the last checkpoint"
    for text in logs:
        if said := ERROR.search(text):
            return said.group().rstrip()
    for rank, local_rank, code in ended:
        return f"error: rank {rank} ended with exit code {code}: {_last_words(of_ranks.get(local_rank, ''))}"
    return f"error: {_last_words(everything)}"


def _last_words(text: str) -> str:
    if exceptions := _EXCEPTION.findall(text):
        return exceptions[-1].strip()
    last = text.strip().rpartition("\n")[2].strip()
    return f"it left no message after: {last}" if last else "it left no message"

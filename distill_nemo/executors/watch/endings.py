"""Find the reason for a task's end in its logs: one `error:` line."""

import re
import signal
from pathlib import Path

from distill_nemo.executors.watch.screen import ERROR

RESUME = "run the same command again to resume from the last checkpoint"
# torchrun's messages: how each rank ended, and which ranks it then stopped itself
_ENDED = re.compile(r"rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+) +\(pid: (\d+)\)")
_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.M)
_PERHAPS = {"SIGKILL": "memory ran out", "SIGBUS": "a file was cut short while it was read"}
_MARKS = re.compile(r"\[default(\d+)\]:(?:\[rank(\d+)\]: ?)?")  # torchrun's local rank; torch's global rank


def why_it_ended(job_dir: Path) -> str:
    """Return the `error: ...` of a failed local task, from the log of each rank."""
    logs = {path: path.read_text(errors="replace") for path in sorted(job_dir.rglob("stderr.log"))}
    of_ranks: dict[int, str] = {}
    for path, text in logs.items():
        if path.parent.name.isdigit() and path.match("attempt_*/*/stderr.log"):
            of_ranks[int(path.parent.name)] = of_ranks.get(int(path.parent.name), "") + text
    everything = "\n".join(logs.values())
    ended = [(rank, code, of_ranks.get(local_rank, "")) for rank, local_rank, code in _ended(everything)]
    return _why(everything, ended, list(logs.values()))


def why_a_log_ended(log: str, first_rank: int = 0) -> str:
    """Return the `error: ...` of a task whose nodes share one log."""
    return why_nodes_ended([(first_rank, log)])


def why_nodes_ended(logs: list[tuple[int, str]]) -> str:
    """Return the `error: ...` of a task from the log of each node, given as (first rank of the node, text)."""
    lines: list[tuple[int, str, str]] = []  # (rank by torchrun's mark, rank by torch's or "", line)
    rest, ended = [], []
    for first_rank, log in logs:
        ended += _ended(log, first_rank)
        for line in log.split("\n"):
            if marks := _MARKS.match(line):
                lines.append((first_rank + int(marks[1]), marks[2] or "", line[marks.end() :]))
            else:
                rest.append(line)
    of_ranks: dict[tuple[int, str], str] = {}
    for local_rank, rank, line in lines:
        of_ranks[local_rank, rank] = of_ranks.get((local_rank, rank), "") + line + "\n"

    def output(rank: str, local_rank: int) -> str:
        return "\n".join(line for local, own, line in lines if own == rank or (not own and local == local_rank))

    everything = "\n".join([*of_ranks.values(), *rest])
    return _why(everything, [(rank, code, output(rank, local)) for rank, local, code in ended], list(of_ranks.values()))


def _ended(text: str, first_rank: int = 0) -> list[tuple[str, int, int]]:
    """Return (rank, rank in the output's marks, exit code) of the ranks that torchrun did not stop itself."""
    closed = _CLOSED.findall(text)
    return [
        (rank, first_rank + int(local), int(code))
        for rank, local, code, pid in _ENDED.findall(text)
        if pid not in closed
    ]


def _why(everything: str, ended: list[tuple[str, int, str]], logs: list[str]) -> str:
    """Return the likeliest reason: a rank that was killed, else a rank's own error, else the last lines of output.

    When a rank is killed the others report lost connections, so their errors are consequences, not the reason.

    Args:
        everything: all output.
        ended: rank, exit code and output of each rank that ended by itself.
        logs: output of each rank.
    """
    for rank, code, _ in ended:
        if code < 0:
            name = signal.Signals(-code).name
            why = f" (perhaps because {_PERHAPS[name]})" if name in _PERHAPS else ""
            return f"error: rank {rank} was killed by {name}{why}; {RESUME}"
    for text in logs:
        if error := ERROR.search(text):
            return error.group().rstrip()
    for rank, code, output in ended:
        return f"error: rank {rank} ended with exit code {code}: {_last_message(output)}"
    return f"error: {_last_message(everything)}"


def _last_message(text: str) -> str:
    if exceptions := _EXCEPTION.findall(text):
        return exceptions[-1].strip()
    last = text.strip().rpartition("\n")[2].strip()
    return f"it left no message after: {last}" if last else "it left no message"

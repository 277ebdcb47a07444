"""`metrics.jsonl`: a JSON object a line, of `kind` start, train, eval or end. Losses are token means in nats.

No torch.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from distill_nemo.runtime.files import write_atomically


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_counted(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines as `read` does, and the number of those that are left out."""
    raws = [raw for raw in _raw_lines(path) if raw.strip()]
    lines = [line for raw in raws if (line := _parsed(raw)) is not None and _step(line) is not None]
    return lines, len(raws) - len(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, without those that are no JSON object with a step, such as one cut by a kill."""
    return read_counted(path)[0]


def finite(value: Any) -> float:
    """Return `value` as a float; NaN if it is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if number else math.nan


def gpu_hours(lines: list[dict[str, Any]]) -> float | None:
    """Return the time of the steps, each on the ranks of its process; None if a process has not recorded its ranks."""
    ranks, total = 0.0, 0.0
    for line in lines:
        if line.get("kind") == "start":
            ranks = max(finite(line.get("world_size")), 0.0)
        elif line.get("kind") == "train":
            total += ranks * max(finite(line.get("seconds")), 0.0)
            if not ranks > 0:
                return None
    return total / 3600 if total > 0 else None


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines after `step`, atomically, since the resumed run writes them again; at step 0 also those of step 0.

    Lines that are no JSON objects are dropped too. All others stay the same, byte for byte.
    """
    kept = []
    for raw in _raw_lines(path):
        line = _parsed(raw)
        if line is not None and _stays(_step(line), step):
            kept.append(raw + b"\n")
    write_atomically(path, b"".join(kept))


def _stays(of_line: int | None, step: int) -> bool:
    return of_line is None or (step > 0 and of_line <= step)


def _raw_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.is_file() else []


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _step(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None

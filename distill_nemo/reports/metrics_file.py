"""`metrics.jsonl`: one JSON object a line, `kind` train, eval or end; losses: global token means in nats. No torch."""

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def truncate_after(path: Path, step: int) -> None:
    """Drop what comes after `step`, atomically: the resumed run writes it anew; from step 0 on, its evaluation too."""
    kept = [line for line in read(path) if line["step"] <= step] if step else []
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)

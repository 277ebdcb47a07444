"""Where checkpoints lie, which is the newest whole one, and whether a run may go on from it. No torch.

`<output_dir>/checkpoints/step_00000120/` holds Megatron's distributed checkpoint, `run.json` (the whole config) and
`architecture.json` (the student's). `latest` names the newest; it is written last, so what it names is whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

MAY_CHANGE = ("steps", "eval_interval", "eval_batches", "micro_batch_size", "stop_on_nan", "num_workers", "cache")
SECTIONS = ("student", "teacher", "data")


def checkpoint_root(output_dir: str) -> Path:
    """Where a run's checkpoints lie."""
    return Path(output_dir) / "checkpoints"


def step_directory(root: Path, step: int) -> Path:
    """The directory of one step."""
    return root / f"step_{step:08d}"


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, or None when there is none.

    Raises:
        ValueError: when the tracker names a directory that is not there, and what to do.
    """
    tracker = root / "latest"
    if not tracker.is_file():
        return None
    directory = root / tracker.read_text().strip()
    if not (directory / "run.json").is_file():
        whole = sorted(path.parent.name for path in root.glob("step_*/run.json"))
        raise ValueError(
            f"{tracker} names {directory.name}, which is missing or incomplete. Whole checkpoints there: "
            f"{', '.join(whole) or 'none'}. Write one of these names into {tracker}, or choose another output_dir"
        )
    return directory


def point_latest_at(directory: Path) -> None:
    """Make `directory` the newest checkpoint, atomically and durably."""
    tracker, partial = directory.parent / "latest", directory.parent / "latest.partial"
    with partial.open("w") as file:
        file.write(directory.name)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, tracker)


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` steps, and what interrupted saves left."""
    for old in sorted(root.glob("step_????????"))[: -max(keep_last, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    for partial in root.glob("step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def check_resumable(saved: dict[str, Any], now: dict[str, Any], resume: bool) -> None:
    """Refuse to go on with another model, teacher or data than the output directory's run had.

    Raises:
        ValueError: naming each field that differs, and what to do.
    """
    if not resume:
        raise ValueError(
            f"{now['output_dir']} already holds a run and checkpoint.resume is off: choose another output_dir, or "
            "delete it"
        )
    differences = []
    for section in SECTIONS:
        before, after = saved[section] or {}, now[section] or {}
        for name in sorted((before.keys() | after.keys()) - set(MAY_CHANGE)):
            if before.get(name) != after.get(name):
                differences.append(f"{section}.{name}: was {before.get(name)!r}, is {after.get(name)!r}")
    for name in ("global_batch_size", "seed", "data_seed"):
        if saved["training"][name] != now["training"][name]:
            differences.append(f"training.{name}: was {saved['training'][name]}, is {now['training'][name]}")
    if differences:
        raise ValueError(
            f"{now['output_dir']} holds another run:\n  "
            + "\n  ".join(differences)
            + "\nRestore these to resume it, or choose another output_dir"
        )

"""Recorded runs: what a run's directory says of it. The directory is not trusted, and nothing in it is unpickled."""

import fcntl
import math
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig
from distill_nemo.config_files import from_dict
from distill_nemo.reports.comparison import MISSING
from distill_nemo.runtime import metrics_file

MAX_METRICS_BYTES, MAX_CONFIG_BYTES = 512 * 2**20, 2**20
MAX_DEPTH = 20
MAX_FILES = 1000  # of an export
SHOWN = 200  # characters of a value


@dataclass(frozen=True)
class RecordedRun:
    """A run as its files describe it.

    Args:
        name: for people.
        directory: its `output_dir`.
        lines: of its `metrics.jsonl`.
        config: its `config.yaml`; None if that is missing or damaged.
        notes: what is missing or could not be read.
    """

    name: str
    directory: Path
    lines: list[dict[str, Any]]
    config: RunConfig | None = None
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind."""
        return [line for line in self.lines if line.get("kind") == kind]

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The newest held-out metrics; empty if there are none."""
        return next(reversed(self.of_kind("eval")), {})

    @property
    def gpu_hours(self) -> float | None:
        """Time of the steps on their ranks; None if a process has not recorded its ranks."""
        return metrics_file.gpu_hours(self.lines)


def read_runs(directories: list[str]) -> list[RecordedRun]:
    """Return the runs in these directories, named as shortly as they stay apart."""
    short = [Path(directory).resolve().name for directory in directories]
    names = short if len(set(short)) == len(short) else directories
    return [read_run(Path(directory), name) for directory, name in zip(directories, names, strict=True)]


def read_run(directory: Path, name: str) -> RecordedRun:
    """Return what the files of a run say. Those that are missing or damaged are noted."""
    lines, notes = _metrics(directory / "metrics.jsonl")
    config: RunConfig | None = None
    try:
        config = _config(directory / "config.yaml")
    except ValueError as error:
        notes.append(str(error)[:SHOWN])
    if lines and not any(line.get("kind") == "eval" for line in lines):
        notes.append("nothing was evaluated on held-out data")
    return RecordedRun(name, directory, lines, config, tuple(notes))


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        return [], ["no metrics.jsonl"]
    if path.stat().st_size > MAX_METRICS_BYTES:
        return [], [f"metrics.jsonl has more than {MAX_METRICS_BYTES:,} bytes and was not read"]
    try:
        lines, left_out = metrics_file.read_counted(path)
    except OSError as error:
        return [], [f"metrics.jsonl cannot be read: {error.strerror}"]
    notes = [f"{left_out} lines of metrics.jsonl are no metrics"] if left_out else []
    return lines, notes if lines else [*notes, "metrics.jsonl is empty"]


def _config(path: Path) -> RunConfig:
    """Return a run's config.

    Raises:
        ValueError: if it is missing, larger than `MAX_CONFIG_BYTES`, or no config.
    """
    import yaml

    if not path.is_file():
        raise ValueError("no config.yaml")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"config.yaml has more than {MAX_CONFIG_BYTES:,} bytes and was not read")
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        return from_dict(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config.yaml cannot be read: {type(error).__name__}") from None


def _check_events(text: str) -> None:
    """Refuse aliases and deep nesting before anything is built, or time is taken by the square of the depth."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise ValueError("config.yaml has YAML aliases or nests too deeply, as no run writes it, and was not read")


def exported_parameters(directory: Path) -> int | None:
    """Return the number of parameters in a Hugging Face directory, from the safetensors headers; None without any."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(directory.glob("*.safetensors"))[:MAX_FILES]:
        try:
            with safe_open(file, "np") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
        except (OSError, SafetensorError):
            return None
    return total or None


def is_going_on(directory: Path) -> bool:
    """Return True if a process holds the run's lock. Neither this nor a crash of ours takes or frees it."""
    try:
        with (directory / "run.lock").open("r+b") as file:
            asked = struct.pack("hhlli", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack("hhlli", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False


def settings(runs: list[RecordedRun]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the fields in which the runs differ, with a value for each run, and those that all share.

    Of a section that a run lacks, such as a teacher, only the checkpoint is a difference.
    """
    flat = [_flat(asdict(run.config)) if run.config else None for run in runs]
    known = [fields for fields in flat if fields is not None]
    differ: dict[str, list[str]] = {}
    same: dict[str, str] = {}
    for name in dict.fromkeys(name for fields in known for name in fields):
        values = {fields.get(name, MISSING) for fields in known}
        if len(values) == 1:
            same[name] = values.pop()
        elif name != "output_dir" and (all(name in fields for fields in known) or name.endswith(".checkpoint")):
            differ[name] = [MISSING if fields is None else fields.get(name, MISSING) for fields in flat]
    return differ, same


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if value is None and name in ("student", "teacher"):
            continue
        if isinstance(value, dict) and value and prefix.count(".") < 1:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            text = str(value)
            flat[f"{prefix}{name}"] = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return flat

"""Checks of tasks from disk, before lm-evaluation-harness reads them: by themselves, its YAML files can run code.

A tag imports Python, an unknown metric is downloaded and run, and some data formats are pickles. Templates are a matter
of `harness.sandboxed_templates`. No torch.
"""

import glob
import hashlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml

from distill_nemo.fields import require
from distill_nemo.runtime.files import why_unreadable

MAX_BYTES = 2**20  # of a YAML file
FORMATS = ("json", "csv", "parquet", "arrow", "text")
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
REFUSED: dict[str, str] = {
    "unsafe_code": "runs what a model writes",
    "trust_remote_code": "lets a data set run code",
    "hf_evaluate": "downloads a metric and runs it",
    "use_prompt": "takes prompts from elsewhere",
}


class TaskFileError(ValueError):
    """A file in `include_path` that is refused."""


def check_task_files(directory: Path, metrics: Container[str]) -> None:
    """Refuse tasks that are, or fetch, code.

    Args:
        directory: `include_path`; every YAML file below, and those that they include, are read.
        metrics: names of lm-evaluation-harness's own.

    Raises:
        ValueError: naming the file, what it would run, and the way out.
    """
    try:
        for path in task_files(directory):
            problem = next(_problems(path, metrics), None)
            require(problem is None, f"{path} {problem}")
    except TaskFileError:
        raise
    except ValueError as error:
        raise ValueError(f"include_path: {error}; allow_code=true, if you trust all that is in {directory}") from None


def task_files(directory: Path) -> list[Path]:
    """Return the YAML files of tasks below a directory, and those that they include.

    Raises:
        TaskFileError: if there are none, or one cannot be read.
    """
    found = sorted(path.resolve() for path in directory.glob("**/*.yaml"))
    if not found:
        raise TaskFileError(f"include_path = {directory} has no tasks: expected *.yaml files below it")
    for path in found:  # grows
        included = _read(path).get("include", [])
        for name in included if isinstance(included, list) else [included]:
            file = (path.parent / str(name)).resolve()
            if file not in found:
                found.append(file)
    return found


def digest(directory: Path, with_code: bool) -> str:
    """Return a hash of the tasks: of their YAML files, and of size and time of the data files that these name.

    Args:
        directory: `include_path`.
        with_code: Python files are part of the tasks.
    """
    files = task_files(directory)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    others = {data for path in files for name, value in _fields(_read(path)) for data in _data_files(name, value)}
    others |= set(directory.glob("**/*.py")) if with_code else set()
    stats = [(str(path.resolve()), path.stat()) for path in sorted(others)]
    sums += [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _data_files(name: str, value: Any) -> Iterator[Path]:
    """Yield the data files that a field names: by themselves, by a pattern, or by a directory."""
    if name == "data_files" and isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _data_files(name, each)
    elif name in ("data_files", "data_dir", "dataset_path") and isinstance(value, str) and value:
        for path in map(Path, glob.iglob(value, recursive=True)):
            yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


class _Loader(yaml.SafeLoader):
    """Loader that keeps the text of a tag of its own, such as `!function`, without importing anything."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TaskFileError(f"include_path: {path} has more than {MAX_BYTES:,} bytes, which is no task")
        value = yaml.load(content, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(why_unreadable(error).split())[:200]
        raise TaskFileError(f"include_path: {path} cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise TaskFileError(f"include_path: {path} must hold the fields of a task, got {type(value).__name__}")
    return value


def _problems(path: Path, metrics: Container[str]) -> Iterator[str]:
    """Yield what a file would run."""
    for event in yaml.parse(path.read_bytes(), yaml.SafeLoader):
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.NodeEvent) and tag not in (None, "!", *PLAIN_TAGS):
            value = event.value if isinstance(event, yaml.ScalarEvent) else ""
            yield f"line {event.start_mark.line + 1}: {tag} {value}".rstrip() + " runs Python code"
    for name, value in _fields(_read(path)):
        if name in REFUSED and value:
            yield f"has {name}: {value}, which {REFUSED[name]}"
        if name == "metric" and isinstance(value, str) and value not in metrics:
            yield f"has metric: {value}, which lm-evaluation-harness would download and run"
        if name == "dataset_path" and not (str(value) in FORMATS or "/" in str(value)):
            yield f"has dataset_path: {value}; data are {', '.join(FORMATS)}, or OWNER/NAME of the hub"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every name and value of mappings within mappings and lists. What aliases repeat comes once."""
    passed, left = set(), [value]
    while left:
        each = left.pop()
        if not isinstance(each, dict | list) or id(each) in passed:
            continue
        passed.add(id(each))
        if isinstance(each, dict):
            yield from ((str(name), inner) for name, inner in each.items())
        left += each.values() if isinstance(each, dict) else each

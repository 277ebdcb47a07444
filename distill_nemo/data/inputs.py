"""Find the input files that a user names by files, directories and globs, and report what is left out."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distill_nemo.data.formats import KNOWN, problem_of, split_suffixes

ABOUT_TEXT = re.compile(r"readme([-_.].*)?|licen[cs]e([-_.].*)?|copying|notice", re.I)  # the stem of a text file
CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # results of `datasets`, beside what they come from
ABOUT_JSON = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "tokenizer.json")
MAX_NAMED = 3  # files named for each reason


@dataclass
class Found:
    """Input files in order, each once, and the paths that are left out, by reason."""

    files: dict[tuple[int, int], Path] = field(default_factory=dict)  # by device and inode, so that links count once
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Add a file, unless it is there already."""
        status = path.stat()
        if self.files.setdefault((status.st_dev, status.st_ino), path) is not path:
            self.skip(path, "the same file again, counted once")

    def skip(self, path: Path, reason: str) -> None:
        """Leave a file or a directory out."""
        self.skipped.setdefault(reason, []).append(path)

    def lines(self) -> list[str]:
        """Return a line for each reason, with the number of paths and the first few."""
        return [f"skipped {len(paths)} ({reason}): {_first(paths)}" for reason, paths in self.skipped.items()]


def _first(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:MAX_NAMED])) + ", ..." * (len(paths) > MAX_NAMED)


def split_inputs(inputs: str) -> list[str]:
    """Split "a, b" at its commas, unless the whole is the name of an existing file."""
    return [inputs] if os.path.lexists(inputs) else [entry.strip() for entry in inputs.split(",")]


def find_files(inputs: list[str]) -> Found:
    """Find the files that `inputs` name by files, directories and globs: in this order, sorted within each.

    Links are followed. Hidden files, READMEs, licences and files without text are left out of directories and globs.

    Raises:
        ValueError: for an input that names nothing, or a named file with an unknown suffix.
    """
    found = Found()
    for entry in inputs:
        if not entry.strip():
            raise ValueError("an input is empty; name files, directories or globs, separated by commas")
        path = Path(os.path.expanduser(entry))
        here = Found()
        for match in [path] if os.path.lexists(path) else _glob(path, here):
            if match.is_dir():
                for file in sorted(directory / name for directory, names in _walk(match, here) for name in names):
                    _take(file, here)
            elif match != path:
                _take(match, here)
            elif problem := problem_of(path):
                raise ValueError(f"{path}: {problem}. {KNOWN}. Convert it, for instance to JSONL, or rename it")
            else:
                here.add(path)
        if not here.files:
            raise ValueError("\n".join([f'no input found for "{entry}". {KNOWN}', *here.lines()]))
        for file in here.files.values():
            found.add(file)
        for reason, paths in here.skipped.items():
            found.skipped.setdefault(reason, []).extend(paths)
    if not found.files:
        raise ValueError(f"no input given: name files, directories or globs. {KNOWN}")
    return found


def _glob(pattern: Path, found: Found) -> list[Path]:
    """Return sorted matches. The longest existing parent is taken literally: "data[1]/*.txt" looks into "data[1]"."""
    there = next(parent for parent in pattern.parents if parent.exists())
    return sorted(_matches(there, pattern.relative_to(there).parts, found))


def _matches(root: Path, parts: tuple[str, ...], found: Found) -> list[Path]:
    """Return paths below `root` that match `parts`. `**` is walked here, since `glob` would follow loops of links."""
    if "**" not in parts:
        return [Path(match) for match in glob.glob(os.path.join(glob.escape(str(root)), *parts))]
    i = parts.index("**")
    starts = _matches(root, parts[:i], found)
    below = [directory for start in starts for directory, _ in _walk(start, found)]
    return [match for directory in below for match in _matches(directory, parts[i + 1 :], found)]


def _walk(top: Path, found: Found) -> Iterator[tuple[Path, list[str]]]:
    """Yield each directory from `top` down once, with the names of its files. Links are followed.

    Raises:
        ValueError: for a directory with several splits of a Hugging Face data set, such as train and test.
    """
    seen = set()
    for name, directories, files in os.walk(top, onerror=_refuse, followlinks=True):
        directory, status = Path(name), os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            found.skip(directory, "a directory that was read already")
            directories.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        splits = [name for name in sorted(directories) if (directory / name / "state.json").is_file()]
        if "dataset_dict.json" in files and len(splits) > 1:
            raise ValueError(
                f"{directory} holds a Hugging Face DatasetDict of {', '.join(splits)}: name the splits to read, such "
                f"as {directory / splits[-1]}"
            )
        for hidden in sorted(name for name in directories + files if name.startswith(".")):
            found.skip(directory / hidden, "hidden")
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield directory, [name for name in files if not name.startswith(".")]


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


def _take(path: Path, found: Found) -> None:
    """Add a file that was found rather than named, or skip it with a reason."""
    if reason := problem_of(path) or _about(path):
        found.skip(path, reason)
    else:
        found.add(path)


def _about(path: Path) -> str:
    """Return why a file is about the documents rather than one of them; "" if it may be one."""
    if split_suffixes(path)[0] in (".txt", ".text", ".md") and ABOUT_TEXT.fullmatch(path.name.partition(".")[0]):
        return "about the text; to include it, name it as an input"
    if CACHE.fullmatch(path.name):
        return "a cache of `datasets`; to include it, name it as an input"
    if path.name in ABOUT_JSON:
        return "about the data"
    if path.suffix == ".json" and path.with_suffix(".bin").exists():
        return "the manifest of token files"
    return ""

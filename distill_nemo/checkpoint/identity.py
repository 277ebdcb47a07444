"""Record a run's config, and hashes of its teacher and token files.

A path does not identify them, since they can be replaced or moved. All their content is hashed, a share by each rank.
A file that was hashed before and has the same size, mtime and inode is not read again.
"""

import contextlib
import json
import re
import time
from collections import ChainMap
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill_nemo.checkpoint.hub_models import named
from distill_nemo.config import RunConfig
from distill_nemo.config_files import to_dict
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.tokenizer import load_tokenizer
from distill_nemo.fields import first_few
from distill_nemo.models.sources import MODELOPT_STATE, find_checkpoint
from distill_nemo.runtime.file_hashes import FilePart, hash_part, join_hashes, parts, whole_file
from distill_nemo.runtime.files import write_atomically
from distill_nemo.runtime.process_groups import of_all_ranks
from distill_nemo.teacher_store.shards import WRITE_AGAIN

DISTRIBUTED = (".metadata", "*.distcp", "common.pt")
WEIGHTS = ("*.safetensors", *DISTRIBUTED, *(f"{MODELOPT_STATE}/{pattern}" for pattern in DISTRIBUTED))
CACHE = "hashes.json"  # in the run's output directory
SHA256 = re.compile(r"[0-9a-f]{64}")
PROGRESS_SECONDS = 10.0

NamedFiles = list[tuple[str, Path | None]]  # name and path; None: the name is all
Stat = tuple[int, int, int]  # size, mtime in ns, inode
_hashed: dict[Path, tuple[Stat, str]] = {}  # by this process


def run_record(config: RunConfig, remember: bool = False) -> dict[str, Any]:
    """Return `run.json`: the whole config, and under `contents` hashes of teacher, token files and tokens.

    Collective: every rank must call it. With `remember` the hashes are stored in the output directory.
    """
    files = {
        "student.checkpoint": weight_files(config.student.checkpoint),
        "teacher.checkpoint": weight_files(config.teacher.checkpoint if config.teacher else None),
        "data.train": corpus_files(config.data.train),
        "data.valid": corpus_files(config.data.valid),
    }
    sums = [corpus_at(value).sums for value in (*config.data.train, *config.data.valid)]
    contents = content_hashes(files, Path(config.output_dir), joined := dict(ChainMap(*sums)))
    if remember and dist.get_rank() == 0:
        remember_hashes(files, Path(config.output_dir), joined)
    tokenizer = config.data.tokenizer
    contents["data.tokenizer"] = load_tokenizer(tokenizer).vocabulary_sha256 if tokenizer else None
    return to_dict(named(config)) | {"contents": contents}


def content_hashes(files: dict[str, NamedFiles], output: Path, sums: dict[Path, str]) -> dict[str, str | None]:
    """Return the hash of the files of each field; None without files. Collective: every rank must call it.

    Further files must have the SHA-256 in `sums`. `output` may have hashes from an earlier run.
    """
    sums = {path.resolve(): value for path, value in sums.items()}
    hashes = hash_files(_paths(files), output / CACHE, sums)
    return {
        field: join_hashes([f"{name}:{hashes[path] if path else ''}\n" for name, path in named]) if named else None
        for field, named in files.items()
    }


def remember_hashes(files: dict[str, NamedFiles], output: Path, sums: dict[Path, str]) -> None:
    """Write the hashes that `content_hashes` found into the directory `output`, for runs to come. For one rank."""
    _write_cache(output / CACHE, [*_paths(files), *(path.resolve() for path in sums)])


def _paths(files: dict[str, NamedFiles]) -> list[Path]:
    return sorted({path for named in files.values() for _, path in named if path})


def hash_files(paths: list[Path], cache: Path, sums: dict[Path, str] | None = None) -> dict[Path, str]:
    """Return the SHA-256 of each file's content, the same on every rank.

    Collectives: one broadcast and one all-gather of hashes; every rank must call it.

    Args:
        paths: files.
        cache: where earlier runs have written hashes.
        sums: further files, with the sum of `sha256sum` that each must have.

    Raises:
        ValueError: on every rank, if any file cannot be read, or has another sum.
    """
    sums = sums or {}
    paths = [*paths, *sums]
    plan: list[Any] = [_plan_or_error(paths, cache, sums) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(plan, src=0)
    if isinstance(plan[0], str):
        raise ValueError(plan[0])
    known, stats, todo = plan[0]
    found = of_all_ranks(_hash_share(todo))
    for share in found:
        if isinstance(share, str):
            raise ValueError(share)
    of_parts: dict[Path, list[str]] = {part.path: [] for part in todo}
    for part, value in zip(todo, (value for share in found for value in share), strict=True):
        of_parts[part.path].append(value)
    hashes = known | {path: join_hashes(values) for path, values in of_parts.items()}
    damaged = [str(path) for path, value in sums.items() if hashes[path] != join_hashes([value])]
    if damaged:
        raise ValueError(f"damaged, by the sums in their manifest: {', '.join(first_few(damaged))}; {WRITE_AGAIN}")
    _hashed.update({path: (stats[path], hashes[path]) for path in paths})
    return hashes


def weight_files(checkpoint: str | None) -> NamedFiles:
    """Return path and name within the checkpoint, which does not change if it moves, of the files with weights."""
    if checkpoint is None:
        return []
    directory = find_checkpoint(Path(checkpoint)).weights
    files = [file for pattern in WEIGHTS for file in directory.glob(pattern)]
    return [(file.relative_to(directory).as_posix(), file.resolve()) for file in files]


def corpus_files(blend: list[str]) -> NamedFiles:
    """Return position and path of the files of a blend, and its weights; names do not matter."""
    named: NamedFiles = []
    for place, value in enumerate(blend):
        files = corpus_at(value).files
        named += [(f"{place}{name}", path.resolve()) for name, path in files.items()]
        named += [] if files else [(f"{place} weight {float(value)}", None)]
    return named


Plan = tuple[dict[Path, str], dict[Path, Stat], list[FilePart]]


def _plan_or_error(paths: list[Path], cache: Path, whole: Container[Path]) -> Plan | str:
    try:
        return _plan(paths, cache, whole)
    except OSError as error:
        return str(error)


def _plan(paths: list[Path], cache: Path, whole: Container[Path]) -> Plan:
    """Return the known hashes, each file's stat, and the parts to hash in the order of the files; some are whole."""
    remembered, stats = _read_cache(cache) | _hashed, {path: _stat(path) for path in paths}
    known = {path: remembered[path][1] for path in paths if remembered.get(path, (None, ""))[0] == stats[path]}
    return known, stats, _parts([path for path in paths if path not in known], whole)


def _parts(paths: list[Path], whole: Container[Path]) -> list[FilePart]:
    return [part for path in paths for part in ([whole_file(path)] if path in whole else parts(path))]


def _hash_share(todo: list[FilePart]) -> list[str] | str:
    """Return the hashes of this rank's share of the parts, about equal in bytes, or the reason for a failure."""
    total, before = sum(part.length for part in todo) or 1, 0
    mine, own_bytes = [], 0
    for part in todo:
        if before * dist.get_world_size() // total == dist.get_rank():
            mine.append(part)
            own_bytes += part.length
        before = min(before + part.length, total - 1)
    hashes, done, reported = [], 0, time.monotonic()
    for part in mine:
        try:
            hashes.append(hash_part(part))
        except (OSError, ValueError) as error:
            return str(error)
        done += part.length
        if dist.get_rank() == 0 and time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f"hashing models and data: {done / own_bytes:.0%} of {total / 1e9:,.0f} GB", flush=True)
    return hashes


def _stat(path: Path) -> Stat:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_cache(cache: Path) -> dict[Path, tuple[Stat, str]]:
    """Return the well-formed entries of the cache."""
    try:
        stored = json.loads(cache.read_bytes()) if cache.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    known = {}
    for path, entry in stored.items() if isinstance(stored, dict) else ():
        if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], str) and SHA256.fullmatch(entry[3]):
            known[Path(path)] = (tuple(entry[:3]), entry[3])
    return known


def _write_cache(cache: Path, paths: list[Path]) -> None:
    lines = {str(path): [*_hashed[path][0], _hashed[path][1]] for path in paths}
    text = json.dumps(lines, indent=1)
    with contextlib.suppress(OSError):  # the cache only saves time
        if not cache.is_file() or cache.read_text(errors="replace") != text:
            write_atomically(cache, text)

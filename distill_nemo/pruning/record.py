"""`pruning.json`: what was cut, by which scores, and from which model and data."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from distill_nemo.config import PruneConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.token_files import sample_sha256
from distill_nemo.models.architecture import Architecture
from distill_nemo.pruning.choice import Kept, Scores
from distill_nemo.pruning.sizes import Sizes
from distill_nemo.runtime.files import read_object_if_any, write_atomically

RECORD = "pruning.json"
NOT_THE_RESULT = ("model", "output", "data", "parallelism")  # fields that do not change it


def identity_of(config: PruneConfig, model: Architecture, possible: list[Sizes]) -> str:
    """Return a hash of all that the choice depends on.

    Of the data's files, size and time of change count; of the model's, size and blocks of the content, since a run
    that is done writes its student again whenever its command is repeated.
    """
    assert model.source is not None
    files = corpus_at(config.data).files.values()
    stats: list[list[Any]] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for file in sorted({tensor.file for tensor in model.source.tensors.values()}):
        stats.append([file.name, file.stat().st_size, sample_sha256(file)])
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_THE_RESULT}
    content = [fields, stats, model.source.config, possible]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def earlier_record(directory: Path, identity: str) -> dict[str, Any] | None:
    """Return the record of a call that cut the same, or None. Its other entries may be damaged."""
    try:
        record = read_object_if_any(directory / RECORD)
    except ValueError:
        return None
    return record if record.get("identity") == identity else None


def unfinished_record(directory: Path, identity: str) -> dict[str, Any] | None:
    """Return the record of an interrupted call that cut the same, as it was written, or None."""
    record = earlier_record(directory, identity)
    return record if record is not None and record.get("sha256") == _sha256(record) else None


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record, a line for each of its entries, and their hash."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in _hashed(record).items()]
    write_atomically(directory / RECORD, "{\n" + ",\n".join(lines) + "\n}\n")


def _hashed(record: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(record))  # with text in place of numbers of layers
    return plain | {"sha256": _sha256(plain)}


def _sha256(plain: dict[str, Any]) -> str:
    others = {name: value for name, value in plain.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def plain_scores(scores: Scores) -> dict[str, Any]:
    """Return the scores with four digits."""
    return {name: _plain(value) for name, value in vars(scores).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else float(f"{value:.4g}")


def kept_of(plain: dict[str, Any]) -> Kept:
    """Return the parts that a record lists; JSON has numbers of layers as text."""
    return Kept(**{name: _numbered(value) for name, value in plain.items()})


def _numbered(value: Any) -> Any:
    return {int(key): _numbered(each) for key, each in value.items()} if isinstance(value, dict) else value

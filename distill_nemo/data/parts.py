"""One part of `prepare`: the function that a worker process runs.

The module's top imports nothing heavy: every worker process pays for it.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nemo.data.manifest import read_json
from distill_nemo.data.readers import Piece, read
from distill_nemo.data.tokenizer import TokenizerFacts, encoder
from distill_nemo.runtime.files import write_atomically

MAX_NAMED_RECORDS = 100  # bad records kept by name


@dataclass(frozen=True)
class Part:
    """The work order of one part, sent to a worker. `key` names all that its result depends on."""

    prefix: str
    pieces: list[Piece]
    key: str
    tokenizer: TokenizerFacts
    text_key: str
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Input bytes, the measure of progress."""
        return sum(piece.num_bytes for piece in self.pieces)


def start_worker() -> None:
    """Each process is one thread of the pool; and none outlives a killed parent, to write into the next run's parts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process runs this"
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_part(part: Part) -> dict[str, Any]:
    """Tokenise one part into its three files; the manifest, written last, says that it is whole."""
    encode = encoder(str(Path(part.prefix).parent / "tokenizer.json"), part.tokenizer.path)
    end = [] if part.tokenizer.eod is None else [part.tokenizer.eod]
    lengths: list[int] = []
    bad: list[tuple[str, str]] = []
    num_bad = 0

    def good() -> Iterator[str]:
        nonlocal num_bad
        for record in itertools.chain.from_iterable(read(piece, part.text_key) for piece in part.pieces):
            if record.problem:
                num_bad += 1
                bad.extend([(record.where, record.problem)] if len(bad) < MAX_NAMED_RECORDS else [])
            else:
                yield record.text

    with open(part.prefix + ".bin", "wb") as file:
        for texts in itertools.batched(good(), 64):
            for ids in filter(None, encode(list(texts))):
                tokens = np.array(ids + end, dtype=part.dtype)
                file.write(tokens.tobytes())
                lengths.append(tokens.size)
    Path(part.prefix + ".len").write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    counts = {"documents": len(lengths), "tokens": sum(lengths), "bad_records": num_bad}
    manifest = {"key": part.key, "inputs": [asdict(piece) for piece in part.pieces], **counts, "bad": bad}
    write_atomically(Path(part.prefix + ".json"), json.dumps(manifest))
    return manifest


def read_part(part: Part) -> dict[str, Any] | None:
    """The manifest of a part made earlier from the same inputs and options, if it is whole."""
    manifest = read_json(Path(part.prefix + ".json"))
    if not manifest or manifest["key"] != part.key:
        return None
    sizes = {".bin": manifest["tokens"] * np.dtype(part.dtype).itemsize, ".len": manifest["documents"] * 4}
    whole = all(file_size(part.prefix + suffix) == size for suffix, size in sizes.items())
    return manifest if whole else None


def digest(value: Any) -> str:
    """The sha256 of a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_size(path: str) -> int:
    """Bytes; -1 without a file."""
    return os.path.getsize(path) if os.path.exists(path) else -1

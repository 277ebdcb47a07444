"""A part of the work of `prepare`, and the function that makes it in a worker process.

Imports nothing heavy at the top, since every worker process pays for it.
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

MAX_NAMED_RECORDS = 100  # bad records listed in a manifest


@dataclass(frozen=True)
class Part:
    """Description of one part, sent to a worker. `key` identifies everything that its result depends on."""

    prefix: str
    pieces: list[Piece]
    key: str
    tokenizer: TokenizerFacts
    text_key: str
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of input, by which progress is measured."""
        return sum(piece.num_bytes for piece in self.pieces)


def start_worker() -> None:
    """Use one thread, and end with the parent: a leftover worker would write into the next run's parts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process runs this"
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_part(part: Part) -> dict[str, Any]:
    """Tokenise one part into its three files. The manifest is written last and marks the part as whole."""
    encode = encoder(str(Path(part.prefix).parent / "tokenizer.json"), part.tokenizer.path)
    end = np.array([] if part.tokenizer.eod is None else [part.tokenizer.eod], dtype=part.dtype)
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
                file.write(np.fromiter(ids, part.dtype, len(ids)))
                file.write(end)
                lengths.append(len(ids) + end.size)
    Path(part.prefix + ".len").write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    counts = {"documents": len(lengths), "tokens": sum(lengths), "bad_records": num_bad}
    manifest = {"key": part.key, "inputs": [asdict(piece) for piece in part.pieces], **counts, "bad": bad}
    write_atomically(Path(part.prefix + ".json"), json.dumps(manifest))
    return manifest


def read_part(part: Part) -> dict[str, Any] | None:
    """Return the manifest of a whole part that was made earlier from the same inputs and options, else None."""
    manifest = read_json(Path(part.prefix + ".json"))
    if not manifest or manifest["key"] != part.key:
        return None
    sizes = {".bin": manifest["tokens"] * np.dtype(part.dtype).itemsize, ".len": manifest["documents"] * 4}
    whole = all(file_size(part.prefix + suffix) == size for suffix, size in sizes.items())
    return manifest if whole else None


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_size(path: str) -> int:
    """Return a file's bytes; -1 if there is no file."""
    return os.path.getsize(path) if os.path.exists(path) else -1

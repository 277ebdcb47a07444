"""A part of the work of `prepare`, and the function that makes it in a worker process.

Imports nothing heavy at the top, since every worker process pays for it.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nemo.data.answers import Range
from distill_nemo.data.chat_tokens import Chat, Tokens, chat_encoder, chat_tokens
from distill_nemo.data.conversations import Conversation, RecordError
from distill_nemo.data.manifest import read_json
from distill_nemo.data.readers import FilePiece, Record, Schema, read
from distill_nemo.data.tokenizer import TokenizerFacts, encoder
from distill_nemo.runtime.files import write_atomically

BATCH_DOCUMENTS = 64  # tokenised in one call
MAX_NAMED_RECORDS = 100  # bad records listed in a manifest


@dataclass(frozen=True)
class Part:
    """Description of one part, sent to a worker. `key` identifies everything that its result depends on."""

    prefix: str
    pieces: list[FilePiece]
    key: str
    tokenizer: TokenizerFacts
    schema: Schema
    dtype: str
    chat: Chat | None = None

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


def forget_tokenizers() -> None:
    """Open tokenizers again for the next parts: a call before may have had others."""
    encoder.cache_clear()
    chat_encoder.cache_clear()


def make_part(part: Part) -> dict[str, Any]:
    """Tokenise one part into its files. The manifest is written last and marks the part as whole.

    It is made in a thread of its own: in the thread that opened a large tokenizer, the library takes a quarter longer,
    most of it in glibc's malloc. Probably that thread's heap is left in pieces, and another thread has another heap.
    """
    fast, stop = _fast(part), threading.Event()
    _ = encoder(fast, part.tokenizer.path) if part.chat is None else chat_encoder(fast)  # is kept open
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_make, part, stop).result()
        except BaseException:
            stop.set()  # for Ctrl-C, which reaches the main thread alone
            raise


def _make(part: Part, stop: threading.Event) -> dict[str, Any]:
    """Make a part. The mask has a byte a token here, and is written for conversations only."""
    end = np.array([] if part.tokenizer.eod is None else [part.tokenizer.eod], dtype=part.dtype)
    lengths: list[int] = []
    bad: list[tuple[str, str]] = []
    num_bad = counted = without_reasoning = 0
    last_apart = True
    with open(part.prefix + ".bin", "wb") as file, contextlib.ExitStack() as stack:
        mask_file = None if part.chat is None else stack.enter_context(open(part.prefix + ".mask", "wb"))
        for record, tokens in _tokens_of(part, stop):
            if isinstance(tokens, RecordError):
                num_bad += 1
                bad.extend([(record.where(), str(tokens))] if len(bad) < MAX_NAMED_RECORDS else [])
                continue
            ids, ranges, is_apart, without = tokens
            if not ids:
                continue
            file.write(np.frombuffer(ids, np.uint32).astype(part.dtype))
            file.write(end)
            lengths.append(len(ids) + end.size)
            last_apart &= is_apart
            without_reasoning += without
            if mask_file is not None:
                mask = _mask(ranges, lengths[-1])
                mask_file.write(mask)
                counted += mask.count(1)
    Path(part.prefix + ".len").write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    tokens = sum(lengths)
    counts: dict[str, int] = {"documents": len(lengths), "tokens": tokens, "bad_records": num_bad}
    counts |= {"counted_tokens": tokens if part.chat is None else counted, "last_apart": last_apart}
    counts["without_reasoning"] = without_reasoning
    manifest = {"key": part.key, "inputs": [asdict(piece) for piece in part.pieces], **counts, "bad": bad}
    write_atomically(Path(part.prefix + ".json"), json.dumps(manifest))
    return manifest


def _fast(part: Part) -> str:
    """Return the file of the fast tokenizer, which other tokenizers do not have."""
    return str(Path(part.prefix).parent / "tokenizer.json")


def _tokens_of(part: Part, stop: threading.Event) -> Iterator[tuple[Record, Tokens | RecordError]]:
    """Yield every record with its tokens, or with what is wrong with it.

    Raises:
        KeyboardInterrupt: once `stop` is set.
    """
    fast = _fast(part)
    records = itertools.chain.from_iterable(read(piece, part.schema) for piece in part.pieces)
    for batch in itertools.batched(records, BATCH_DOCUMENTS):
        if stop.is_set():
            raise KeyboardInterrupt
        documents = [record.document for record in batch if not record.problem]
        if part.chat is None:
            encode = encoder(fast, part.tokenizer.path)
            found = map(Tokens, encode([text for text in documents if isinstance(text, str)]))
        else:
            conversations = [document for document in documents if isinstance(document, Conversation)]
            found = iter(chat_tokens(fast, part.chat, conversations))
        for record in batch:
            yield record, RecordError(record.problem) if record.problem else next(found)


def _mask(ranges: list[Range] | None, length: int) -> bytearray:
    """Return a document's mask of `length` bytes, 1 where a token counts."""
    mask = bytearray(length)
    for start, stop in [(0, length)] if ranges is None else ranges:
        mask[start:stop] = b"\1" * (stop - start)
    return mask


def read_part(part: Part) -> dict[str, Any] | None:
    """Return the manifest of a whole part that was made earlier from the same inputs and options, else None."""
    manifest = read_json(Path(part.prefix + ".json"))
    if not manifest or manifest["key"] != part.key:
        return None
    sizes = {".bin": manifest["tokens"] * np.dtype(part.dtype).itemsize, ".len": manifest["documents"] * 4}
    sizes |= {} if part.chat is None else {".mask": manifest["tokens"]}
    whole = all(file_size(part.prefix + suffix) == size for suffix, size in sizes.items())
    return manifest if whole else None


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_size(path: str) -> int:
    """Return a file's bytes; -1 if there is no file."""
    return os.path.getsize(path) if os.path.exists(path) else -1

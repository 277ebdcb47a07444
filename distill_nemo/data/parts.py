"""One part of `prepare`: what a worker process runs, and the tokenizer it runs with.

The module's top imports nothing heavy: every worker process pays for it.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nemo.data.readers import Piece, read

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>")  # where the tokenizer names no eos_token
MAX_LISTED = 100  # bad records kept by name


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer directory, and what decides the tokens it makes."""

    path: str
    sha256: str
    vocab_size: int  # highest id + 1, added tokens included
    eod: int | None


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


def open_tokenizer(path: str, append_eod: bool) -> tuple[TokenizerFacts, Callable[[Path], None]]:
    """The facts of a tokenizer, and a function that saves its fast form (if it has one) for the workers."""
    loaded = load_tokenizer(path)
    eod = loaded.eos_token_id
    if eod is None:
        known = loaded.get_vocab()
        eod = next((known[token] for token in EOD_TOKENS if token in known), None)
    if append_eod and eod is None:
        raise ValueError(
            f"the tokenizer {path} names no eos_token, and none of {', '.join(EOD_TOKENS)} is in its vocabulary: set "
            "eos_token in its tokenizer_config.json, or prepare with append_eod = false"
        )
    files = [Path(path) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    sha256 = hashlib.sha256(next((file.read_bytes() for file in files if file.is_file()), b"")).hexdigest()
    vocab_size = max(loaded.get_vocab().values()) + 1
    backend = getattr(loaded, "backend_tokenizer", None)
    tok = TokenizerFacts(path, sha256, vocab_size, eod if append_eod else None)
    return tok, lambda to: backend.save(str(to)) if backend is not None else to.unlink(missing_ok=True)


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a Hugging Face directory.

    Raises:
        ValueError: when there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"no such tokenizer directory: {path}; name a directory with tokenizer.json")
    bare = not (directory / "tokenizer_config.json").exists() and not (directory / "config.json").exists()
    try:
        if bare and (directory / "tokenizer.json").exists():
            return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever the file provoked
        raise ValueError(f"{path} is not a Hugging Face tokenizer directory that can be loaded: {error}") from error


def start_worker() -> None:
    """Each process is one thread of the pool; and none outlives a killed parent, to write into the next run's parts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process runs this"
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_part(part: Part) -> dict[str, Any]:
    """Tokenise one part into its three files; the manifest, written last, says that it is whole."""
    encode = _encoder(str(Path(part.prefix).parent / "tokenizer.json"), part.tokenizer.path)
    end = [] if part.tokenizer.eod is None else [part.tokenizer.eod]
    lengths: list[int] = []
    bad: list[tuple[str, str]] = []
    num_bad = 0

    def good() -> Iterator[str]:
        nonlocal num_bad
        for record in itertools.chain.from_iterable(read(piece, part.text_key) for piece in part.pieces):
            if record.problem:
                num_bad += 1
                bad.extend([(record.where, record.problem)] if len(bad) < MAX_LISTED else [])
            else:
                yield record.text

    with open(part.prefix + ".bin", "wb") as file:
        for texts in itertools.batched(good(), 64):
            for ids in filter(None, encode(list(texts))):
                tokens = np.array(ids + end, dtype=part.dtype)
                file.write(tokens.tobytes())
                lengths.append(tokens.size)
    np.array(lengths, dtype=np.int32).tofile(part.prefix + ".len")
    counts = {"documents": len(lengths), "tokens": sum(lengths), "bad_records": num_bad}
    manifest = {"key": part.key, "inputs": [asdict(piece) for piece in part.pieces], **counts, "bad": bad}
    write_json(Path(part.prefix + ".json"), manifest)
    return manifest


@functools.cache
def _encoder(fast: str, path: str) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids, without special tokens. `fast` is the saved fast tokenizer; without one, transformers is loaded."""
    if not Path(fast).exists():
        slow = load_tokenizer(path)
        return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(fast)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)

"""The tokenizer in a Hugging Face directory: opened, measured, and given to the worker processes of `prepare`.

The module's top imports nothing heavy: every worker process pays for it.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>")  # where the tokenizer names no eos_token


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer directory, and what decides the tokens it makes."""

    path: str
    sha256: str
    vocab_size: int  # highest id + 1, added tokens included
    eod: int | None


def open_tokenizer(path: str, append_eod: bool) -> tuple[TokenizerFacts, dict[int, str], Callable[[Path], None]]:
    """The facts of a tokenizer, its tokens by id, and a function that saves its fast form (if any) for the workers."""
    loaded = load_tokenizer(path)
    known: dict[str, int] = loaded.get_vocab()
    eod = loaded.eos_token_id
    if eod is None:
        eod = next((known[token] for token in EOD_TOKENS if token in known), None)
    if append_eod and eod is None:
        raise ValueError(
            f"the tokenizer {path} names no eos_token, and none of {', '.join(EOD_TOKENS)} is in its vocabulary: set "
            "eos_token in its tokenizer_config.json, or prepare with append_eod = false"
        )
    files = [Path(path) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    sha256 = hashlib.sha256(next((file.read_bytes() for file in files if file.is_file()), b"")).hexdigest()
    vocab_size = max(known.values()) + 1
    backend = getattr(loaded, "backend_tokenizer", None)
    tok = TokenizerFacts(path, sha256, vocab_size, eod if append_eod else None)
    tokens = {i: token for token, i in known.items()}
    return tok, tokens, lambda to: backend.save(str(to)) if backend is not None else to.unlink(missing_ok=True)


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


@functools.cache
def encoder(fast: str, path: str) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids, without special tokens. `fast` is the saved fast tokenizer; without one, transformers is loaded."""
    if not Path(fast).exists():
        slow = load_tokenizer(path)
        return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(fast)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

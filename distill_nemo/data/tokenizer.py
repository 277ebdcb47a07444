"""The tokenizer in a Hugging Face directory.

`tokenizer.json` is opened by the tokenizers library itself, because transformers 5 lets the class named beside it
replace its normalizer, pre-tokenizer and decoder. Without that file, transformers converts the files that are there
(sentencepiece, tiktoken, or vocab.json with merges.txt).

Imports nothing heavy at the top, since every worker process of `prepare` pays for it.
"""

import functools
import hashlib
import importlib.util
import json
import re
import unicodedata
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_nemo.data.token_places import steps_of
from distill_nemo.runtime.files import read_object_if_any, write_atomically

if TYPE_CHECKING:
    import tokenizers
    import transformers

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>")  # tried if there is no eos_token
VOCABULARIES = ("*.model", "vocab*", "*.tiktoken", "tekken.json")  # besides tokenizer.json
HASHED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*\[')
MAX_IDS = 2**24  # far above any model's vocabulary; bounds the table of all ids
Encode = Callable[[list[str]], "list[array[int]]"]


@dataclass(frozen=True)
class TokenizerFacts:
    """The facts of a tokenizer that determine its tokens, and its directory."""

    path: str
    sha256: str
    vocab_size: int  # highest id + 1, added tokens included
    eod: int | None


@dataclass(frozen=True)
class Tokenizer:
    """An opened tokenizer."""

    path: str
    special_tokens: dict[str, Any]  # by name, such as "eos_token", as stated in the files
    vocab: dict[str, int]  # the id of every token that `encode` can return
    added: set[str]  # tokens added to the model's own vocabulary
    invented: set[str]  # added tokens that no file states, but to which transformers gave an id
    fast: "tokenizers.Tokenizer | None"
    encode: Encode  # texts -> ids, without special tokens

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token, or None if no file names it.

        Raises:
            ValueError: if the name stands for anything but one token of the vocabulary. transformers would give such
                a token a new id, which no model has learnt.
        """
        stated = self.special_tokens.get(name)
        token = stated.get("content") if isinstance(stated, dict) else stated
        if token is None:
            return None
        if not isinstance(token, str):
            raise ValueError(f"{self.path}: {name} must be one token, got {stated!r}")
        if token not in self.vocab or token in self.invented:
            raise ValueError(
                f'{self.path}: {name} = "{token}" is not a token of its vocabulary ({len(self.vocab)} tokens): name '
                "one of them in tokenizer_config.json and special_tokens_map.json"
            )
        return self.vocab[token]

    @property
    def vocabulary_sha256(self) -> str:
        """Hash of the token of every id. A copied directory or another chat template has the same."""
        return hashlib.sha256(json.dumps(self.vocab, sort_keys=True).encode()).hexdigest()


def facts_of(tokenizer: Tokenizer, append_eod: bool) -> TokenizerFacts:
    """Return the facts of a tokenizer.

    Raises:
        ValueError: with `append_eod`, if it has no end-of-document token.
    """
    eod = _end_of_document(tokenizer) if append_eod else None
    files = [Path(tokenizer.path) / name for name in HASHED]
    sha256 = hashlib.sha256(next((file.read_bytes() for file in files if file.is_file()), b"")).hexdigest()
    return TokenizerFacts(tokenizer.path, sha256, max(tokenizer.vocab.values()) + 1, eod)


def save_fast(tokenizer: Tokenizer, path: Path) -> None:
    """Save the fast form for workers, if there is one."""
    path.unlink(missing_ok=True)
    if tokenizer.fast is not None:
        write_atomically(path, tokenizer.fast.to_str())  # its own save raises no OSError on a full disk


def _end_of_document(tokenizer: Tokenizer) -> int:
    try:
        eod = tokenizer.token_id("eos_token")
    except ValueError as error:
        raise ValueError(f"{error}; or prepare with append_eod = false") from None
    if eod is None:
        known = tokenizer.vocab.keys() - tokenizer.invented
        eod = next((tokenizer.vocab[token] for token in EOD_TOKENS if token in known), None)
    if eod is None:
        raise ValueError(
            f"the tokenizer {tokenizer.path} names no eos_token, and none of {', '.join(EOD_TOKENS)} is in its "
            "vocabulary: set eos_token in its tokenizer_config.json, or prepare with append_eod = false"
        )
    return eod


def load_tokenizer(path: str) -> Tokenizer:
    """Open the tokenizer in a Hugging Face directory.

    Raises:
        ValueError: if there is none, or it cannot be opened.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"no such tokenizer directory: {path}; name a directory with tokenizer.json")
    config = read_object_if_any(directory / "tokenizer_config.json")
    legacy = read_object_if_any(directory / "special_tokens_map.json")
    # As in transformers, the older file takes precedence unless the newer format is complete.
    special_tokens = legacy | config if "added_tokens_decoder" in config else config | legacy
    added = _added_tokens(directory, config)
    has_json = (directory / "tokenizer.json").is_file()
    if not has_json:
        _check_files(directory)
    try:
        if has_json:
            tokenizer = _from_tokenizer_json(path, special_tokens, added)
        else:
            tokenizer = _from_transformers(path, special_tokens, set(added))
    except Exception as error:  # transformers and tokenizers may raise anything
        raise ValueError(f"{path} is not a Hugging Face tokenizer directory that can be loaded: {error}") from error
    if not tokenizer.vocab:
        raise ValueError(f"{path}: its tokenizer has no tokens")
    token, largest = max(tokenizer.vocab.items(), key=lambda item: item[1])
    if largest >= MAX_IDS:
        raise ValueError(f'{path}: its token "{token:.40}" has the id {largest}; ids must be below {MAX_IDS:,}')
    return tokenizer


def _added_tokens(directory: Path, config: dict[str, Any]) -> "dict[str, tuple[int, tokenizers.AddedToken]]":
    """Return id and token by content, as `tokenizer_config.json` or the older `added_tokens.json` states them."""
    import tokenizers

    try:
        if "added_tokens_decoder" not in config:
            older = read_object_if_any(directory / "added_tokens.json")
            return {token: (int(i), tokenizers.AddedToken(token, normalized=False)) for token, i in older.items()}
        added = {}
        for i, about in config["added_tokens_decoder"].items():
            options = {name: value for name, value in about.items() if name != "__type"}
            added[about["content"]] = (int(i), tokenizers.AddedToken(**options))
        return added
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: its added tokens cannot be read: {error!r}") from None


def _from_tokenizer_json(
    path: str, special_tokens: dict[str, Any], added: "dict[str, tuple[int, tokenizers.AddedToken]]"
) -> Tokenizer:
    import tokenizers

    file = Path(path) / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    stated = {about["content"]: about["id"] for about in _stated_tokens(file.read_text(encoding="utf-8"))}
    for token, (i, about) in sorted(added.items(), key=lambda item: item[1][0]):
        if fast.token_to_id(token) is None:
            stated[token] = i
            fast.add_tokens([about])
    apart = [(token, i) for token, i in stated.items() if fast.token_to_id(token) != i]
    if apart:
        token, i = apart[0]
        raise ValueError(
            f'the added token "{token}" has the id {i}, but the tokenizers library, which numbers added tokens without '
            f"gaps, gives it {fast.token_to_id(token)}"
        )
    vocab = fast.get_vocab()
    added_tokens = (token.content for token in fast.get_added_tokens_decoder().values())
    beyond = {token for token in added_tokens if fast.model.token_to_id(token) is None}
    return Tokenizer(path, special_tokens, vocab, beyond, set(), fast, encoder_of(fast, _cannot_encode(path)))


def _stated_tokens(text: str) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer.json, as it states them.

    Reads the list alone if nothing else looks like it: a large vocabulary takes a third of a second.
    """
    lists = list(ADDED_TOKENS.finditer(text))
    if len(lists) == 1:
        return json.JSONDecoder().raw_decode(text, lists[0].end() - 1)[0]
    return json.loads(text).get("added_tokens") or []


def encoder_of(fast: "tokenizers.Tokenizer", problem: str) -> Encode:
    """Return the function from texts to ids of a fast tokenizer, which is changed so that these follow from the text.

    It then cuts and fills no text, and leaves out no merges at random.

    A normalizer that only composes characters (Unicode's form NFC) leaves a text in that form as it is, but takes a
    tenth of the library's time. Such texts are encoded without it.

    Args:
        fast: the tokenizer. One thread at a time may use it.
        problem: beginning of the error if it cannot encode a text.
    """
    fast.no_truncation()
    fast.no_padding()
    if getattr(fast.model, "dropout", None):
        fast.model.dropout = None
    normalizer, only_composes = fast.normalizer, _only_composes(fast)

    def encode(texts: list[str]) -> "list[array[int]]":
        is_composed = only_composes and all(map(_is_composed, texts))
        try:
            if is_composed:
                fast.normalizer = None
            encodings = fast.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library's only class of errors
            raise ValueError(f"{problem}: {error}") from None
        finally:
            if is_composed:
                fast.normalizer = normalizer
        return [array("I", encoding.ids) for encoding in encodings]  # a list at a time; numpy takes four times as long

    return encode


def _only_composes(fast: "tokenizers.Tokenizer") -> bool:
    """Return True if a tokenizer's normalizer leaves texts in Unicode's form NFC as they are, and so do its tokens."""
    steps = [step["type"] for step in steps_of(fast.normalizer)]
    added = fast.get_added_tokens_decoder().values()  # those that it composes are not found without it
    return bool(steps) and set(steps) == {"NFC"} and all(_is_composed(token.content) for token in added)


_is_composed = functools.partial(unicodedata.is_normalized, "NFC")


def _cannot_encode(path: str) -> str:
    return f"{path}: its tokenizer cannot encode the text"


def _from_transformers(path: str, special_tokens: dict[str, Any], added: set[str]) -> Tokenizer:
    """Let transformers convert other kinds of files. It gives special tokens that the files lack new ids."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from distill_nemo.models.checkpoints.pretrained import open_pretrained

    loaded = open_pretrained(AutoTokenizer, path)
    vocab = loaded.get_vocab()
    if isinstance(loaded, PreTrainedTokenizerFast):
        fast = loaded.backend_tokenizer
        beyond, encode = vocab.keys() - fast.get_vocab(with_added_tokens=False), encoder_of(fast, _cannot_encode(path))
    else:
        fast = None
        beyond = {token for token, i in vocab.items() if i >= loaded.vocab_size}
        encode = functools.partial(_encode_slowly, loaded)
    invented = beyond - added
    known = vocab.keys() - invented
    defaults = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str) and v in known}
    return Tokenizer(path, defaults | special_tokens, vocab, beyond, invented, fast, encode)


def _encode_slowly(tokenizer: "transformers.PreTrainedTokenizerBase", texts: list[str]) -> "list[array[int]]":
    return [array("I", ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _check_files(directory: Path) -> None:
    """Refuse a directory without a vocabulary, and a `*.model` whose library is not installed.

    For a sentencepiece model, transformers would report that tiktoken is missing.
    """
    if not any(file.is_file() for pattern in VOCABULARIES for file in directory.glob(pattern)):
        raise ValueError(f"{directory} holds no tokenizer ({', '.join(('tokenizer.json', *VOCABULARIES))})")
    for file in sorted(directory.glob("*.model")):
        with file.open("rb") as opened:
            start = opened.readline(1000)
        if start.startswith(b"\n"):  # the tag of a sentencepiece model's first field
            kind, packages = "sentencepiece", {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        elif re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", start):
            kind, packages = "tiktoken", {"tiktoken": "tiktoken"}
        else:
            raise ValueError(f"{file} is neither a sentencepiece nor a tiktoken model")
        missing = [name for name, module in packages.items() if not _installed(module)]
        if missing:
            raise ValueError(
                f"{file} is a {kind} model, which needs {' and '.join(missing)}: pip install {' '.join(missing)}, or "
                "use a directory with tokenizer.json"
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent package
        return False


@functools.cache
def encoder(fast: str, path: str) -> Encode:
    """Return the function from texts to ids, of the saved fast tokenizer `fast`, else of the directory `path`."""
    if not Path(fast).exists():
        return load_tokenizer(path).encode
    import tokenizers

    return encoder_of(tokenizers.Tokenizer.from_file(fast), _cannot_encode(path))

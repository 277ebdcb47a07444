"""Show documents of token files as tokens: which of them count, and the packs that they are in."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from distill_nemo.config import DataConfig
from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.manifest import name_of, pack_length, read_manifest, vocabulary
from distill_nemo.data.token_files import check_files, document_lengths, index_layout
from distill_nemo.data.token_masks import mask_of
from distill_nemo.data.tokenizer import MAX_IDS, load_tokenizer
from distill_nemo.fields import require
from distill_nemo.hub import directory_of
from distill_nemo.teacher_store.manifest import MANIFEST

COUNTS, MASKED = "bold green", "dim"
MAX_TOKENS = 4096  # shown of a document
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) != "\n"} | {0x7F: 0x2421}  # as pictures: ␛
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # a text may not steer the terminal


@dataclass(frozen=True)
class ShownDocument:
    """A document to show.

    Args:
        about: its number and size.
        pack: the same of its pack, if it is the first one in it.
        tokens: the text of each token, and whether it counts. Tokens that make one character are one.
        num_left_out: tokens at the end that are not shown.
        has_mask: some tokens may not count.
    """

    about: str
    pack: str
    tokens: list[tuple[str, bool]]
    num_left_out: int
    has_mask: bool


def inspect_documents(prefix: str, samples: int, tokenizer: str | None, console: Console) -> None:
    """Print documents that are spread over the files, or packs with their documents.

    Tokens that count are green, and every other token is underlined. Where there is no colour, text that counts is
    between two marks.

    Args:
        prefix: of the token files.
        samples: number of documents or packs.
        tokenizer: a Hugging Face tokenizer directory; None for the one in the manifest.
        console: where to print.

    Raises:
        ValueError: from `shown_documents`.
    """
    for document in shown_documents(prefix, samples, tokenizer):
        if document.pack:
            console.rule(document.pack, characters="═")
        console.rule(document.about)
        print_tokens(console, document.tokens, document.has_mask, document.num_left_out)


def print_tokens(console: Console, tokens: list[tuple[str, bool]], has_mask: bool, num_left_out: int) -> None:
    """Print the text of tokens, with those that count in green, or between marks."""
    shown, marked, parity = Text(), has_mask and not console.is_terminal, 0
    for counts, run in itertools.groupby(tokens, key=lambda token: token[1]):
        shown.append("⟦" if marked and counts else "")
        for text, _ in run:
            shown.append(text, (COUNTS if counts else MASKED) + " underline" * parity)
            parity = 1 - parity
        shown.append("⟧" if marked and counts else "")
    if num_left_out:
        shown.append(f" ... and {num_left_out:,} more tokens")
    console.print(shown, soft_wrap=True)


def shown_documents(
    prefix: str,
    samples: int,
    tokenizer: str | None = None,
    max_tokens: int = MAX_TOKENS,
    loss_on: LossOn | None = None,
) -> Iterator[ShownDocument]:
    """Yield documents, or all documents of packs, that are spread over token files.

    Args:
        prefix: of the token files.
        samples: number of documents or packs.
        tokenizer: a Hugging Face tokenizer directory; None for the one in the manifest.
        max_tokens: shown of a document.
        loss_on: tokens that count, as in `data.loss_on` of a run.

    Raises:
        ValueError: if the files are damaged, or the tokenizer is missing, is not a fast one, or did not make the files.
    """
    (prefix,) = DataConfig(train=[prefix]).train
    require(
        Path(f"{prefix}.idx").is_file(),
        f"data: {prefix} is neither a teacher store (no file {Path(prefix, MANIFEST)}) nor the prefix of token files "
        f"(no file {prefix}.idx)",
    )
    pack = pack_length(prefix)
    check_files("data", prefix, DataConfig() if pack is None else DataConfig(sequence_length=pack))
    fast = tokenizer_of(prefix, tokenizer)
    lengths, layout = np.array(document_lengths(prefix)), index_layout(prefix)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    bounds = np.arange(len(lengths) + 1)
    if pack is not None:
        bounds = np.fromfile(f"{prefix}.idx", np.int64, layout.groups + 1, offset=layout.bounds_at)
    mask = mask_of(prefix, loss_on)
    ids = np.memmap(f"{prefix}.bin", layout.dtype, "r")
    groups = len(bounds) - 1
    for group in np.linspace(0, groups - 1, min(samples, groups)).round().astype(int):
        first, stop = bounds[group : group + 2].tolist()
        size = f"{stop - first:,} documents, {lengths[first:stop].sum():,} of {(pack or 0) + 1:,} tokens"
        of_pack = "" if pack is None else f"pack {group + 1:,} of {groups:,}: {size}"
        for number in range(first, stop):
            place, length = int(starts[number]), int(lengths[number])
            shown = ids[place : place + min(length, max_tokens)].tolist()
            _check_ids(f"{name_of(prefix)}: document {number + 1:,}", shown, fast)
            bits = np.ones(length, np.uint8) if mask is None else mask.of_document(place, length)
            yield ShownDocument(
                f"document {number + 1:,} of {len(lengths):,}: {length:,} tokens, {int(bits.sum()):,} count",
                of_pack if number == first else "",
                texts(fast, shown, bits),
                max(length - max_tokens, 0),
                mask is not None,
            )


def _check_ids(where: str, ids: list[int], fast: tokenizers.Tokenizer) -> None:
    """Refuse ids that are no tokens: the library leaves them out of a text, and raises TypeError for some."""
    for i in ids:
        require(
            0 <= i < MAX_IDS and fast.id_to_token(i) is not None,
            f"{where} has the id {i}, which is no token of the tokenizer: pass tokenizer=DIRECTORY with the one that "
            "made the files",
        )


def texts(fast: tokenizers.Tokenizer, ids: list[int], bits: np.ndarray) -> list[tuple[str, bool]]:
    """Return the text of each token, and whether it counts. A token that ends inside a character waits for the next."""
    found, stream, text = [], DecodeStream(skip_special_tokens=False), ""
    for token, counts in zip(ids, bits[: len(ids)].tolist(), strict=True):
        text = stream.step(fast, token)
        if text is not None:
            found.append((text.translate(CONTROLS), bool(counts)))
    return found if text is not None else [*found, ("\ufffd", bool(bits[len(ids) - 1]))]


def tokenizer_of(prefix: str, given: str | None) -> tokenizers.Tokenizer:
    """Return the given tokenizer, else the one that the manifest of a corpus names.

    Raises:
        ValueError: if there is none, or it is no fast one, or not the one that made the corpus.
    """
    manifest = read_manifest(prefix)
    path = given or manifest.get("tokenizer")
    if not isinstance(path, str):
        raise ValueError(f"the manifest of {name_of(prefix)} names no tokenizer: pass tokenizer=DIRECTORY")
    fast = load_tokenizer(directory_of(path, weights=False)).fast
    if fast is None:
        raise ValueError(f"{path} has no fast tokenizer, which shows special tokens as they are")
    made_with = vocabulary(manifest) or {}
    apart = [i for i, token in made_with.items() if fast.id_to_token(i) != token]
    if apart:
        i = apart[0]
        raise ValueError(
            f"{path} is another tokenizer than the one of {name_of(prefix)}: of {len(made_with):,} ids that occur "
            f"{len(apart):,} are other tokens, such as {i}: {fast.id_to_token(i)!r} and {made_with[i]!r}"
        )
    return fast

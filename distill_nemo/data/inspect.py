"""Show documents of token files as text, with the tokens that count and the packs that they are in."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from distill_nemo.config import DataConfig
from distill_nemo.data.manifest import pack_length, read_manifest
from distill_nemo.data.token_files import check_token_files, document_lengths, index_layout
from distill_nemo.data.token_masks import TokenMask
from distill_nemo.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import tokenizers

COUNTS, MASKED = "bold green", "dim"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # as pictures: ␛
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # a text may not steer the terminal


def inspect_documents(prefix: str, samples: int, tokenizer: str | None, console: Console) -> None:
    """Print documents that are spread over the files, or packs with their documents.

    Tokens that count are green; where there is no colour, they are between two marks.

    Args:
        prefix: of the token files.
        samples: number of documents or packs.
        tokenizer: a Hugging Face tokenizer directory; None for the one in the manifest.
        console: where to print.

    Raises:
        ValueError: if the files are damaged, or the tokenizer is missing or is not a fast one.
    """
    pack = pack_length(prefix)
    check_token_files(DataConfig(train=[prefix]) if pack is None else DataConfig(train=[prefix], sequence_length=pack))
    path = tokenizer or read_manifest(prefix).get("tokenizer")
    if not isinstance(path, str):
        raise ValueError(f"{prefix}.json names no tokenizer: pass tokenizer=DIRECTORY")
    fast = load_tokenizer(path).fast
    if fast is None:
        raise ValueError(f"{path} has no fast tokenizer, which shows special tokens as they are")
    lengths, layout = np.array(document_lengths(prefix)), index_layout(prefix)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    bounds = np.arange(len(lengths) + 1)
    if pack is not None:
        bounds = np.fromfile(f"{prefix}.idx", np.int64, layout.groups + 1, offset=layout.bounds_at)
    mask = TokenMask(prefix) if Path(f"{prefix}.mask").exists() else None
    ids = np.memmap(f"{prefix}.bin", layout.dtype, "r")
    groups = len(bounds) - 1
    for group in np.linspace(0, groups - 1, min(samples, groups)).round().astype(int):
        first, stop = bounds[group : group + 2].tolist()
        if pack is not None:
            about = f"{stop - first:,} documents, {lengths[first:stop].sum():,} of {pack + 1:,} tokens"
            console.rule(f"pack {group + 1:,} of {groups:,}: {about}", characters="═")
        for number in range(first, stop):
            place, length = int(starts[number]), int(lengths[number])
            bits = np.ones(length, np.uint8) if mask is None else mask.of_document(place, length)
            about = f"{length:,} tokens, {int(bits.sum()):,} count"
            console.rule(f"document {number + 1:,} of {len(lengths):,}: {about}")
            marked = mask is not None and not console.is_terminal
            console.print(_shown(fast, ids[place : place + length].tolist(), bits, marked), soft_wrap=True)


def _shown(fast: "tokenizers.Tokenizer", ids: list[int], bits: np.ndarray, marked: bool) -> Text:
    """Return a document's text in two styles. Text that counts is between marks if `marked`."""
    shown = Text()
    for counts, places in itertools.groupby(range(len(ids)), bits.tolist().__getitem__):
        text = fast.decode([ids[i] for i in places], skip_special_tokens=False).translate(CONTROLS)
        shown.append(f"⟦{text}⟧" if marked and counts else text, COUNTS if counts else MASKED)
    return shown

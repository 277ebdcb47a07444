"""Show documents of token files as text, with the tokens that count."""

import itertools
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from distill_nemo.config import DataConfig
from distill_nemo.data.manifest import read_manifest
from distill_nemo.data.token_files import check_token_files, document_lengths, index_layout
from distill_nemo.data.token_masks import TokenMask
from distill_nemo.data.tokenizer import load_tokenizer

COUNTS, MASKED = "bold green", "dim"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # as pictures: ␛
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # a text may not steer the terminal


def inspect_documents(prefix: str, samples: int, tokenizer: str | None, console: Console) -> None:
    """Print documents that are spread over the files.

    Tokens that count are green; where there is no colour, they are between two marks.

    Args:
        prefix: of the token files.
        samples: number of documents.
        tokenizer: a Hugging Face tokenizer directory; None for the one in the manifest.
        console: where to print.

    Raises:
        ValueError: if the files are damaged, or the tokenizer is missing or is not a fast one.
    """
    check_token_files(DataConfig(train=[prefix]))
    path = tokenizer or read_manifest(prefix).get("tokenizer")
    if not isinstance(path, str):
        raise ValueError(f"{prefix}.json names no tokenizer: pass tokenizer=DIRECTORY")
    fast = load_tokenizer(path).fast
    if fast is None:
        raise ValueError(f"{path} has no fast tokenizer, which shows special tokens as they are")
    lengths = np.array(document_lengths(prefix))
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    mask = TokenMask(prefix) if Path(f"{prefix}.mask").exists() else None
    ids = np.memmap(f"{prefix}.bin", index_layout(prefix).dtype, "r")
    for number in np.linspace(0, len(lengths) - 1, min(samples, len(lengths))).round().astype(int):
        first, length = int(starts[number]), int(lengths[number])
        bits = np.ones(length, np.uint8) if mask is None else mask.of_document(first, length)
        console.rule(f"document {number + 1:,} of {len(lengths):,}: {length:,} tokens, {int(bits.sum()):,} count")
        shown = Text()
        for counts, places in itertools.groupby(range(length), bits.tolist().__getitem__):
            text = fast.decode([int(ids[first + i]) for i in places], skip_special_tokens=False).translate(CONTROLS)
            marked = counts and mask is not None and not console.is_terminal
            shown.append(f"⟦{text}⟧" if marked else text, COUNTS if counts else MASKED)
        console.print(shown, soft_wrap=True)

"""Show windows of a teacher store: their text, the tokens that have targets, and what the teacher says of them."""

import json
import math
from collections.abc import Iterator

import numpy as np
import tokenizers
from rich.console import Console
from rich.text import Text

from distill_nemo.data.inspect import CONTROLS, MAX_TOKENS, print_tokens, texts, tokenizer_of
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.reader import TeacherStore

SHOWN_TARGETS = 12  # of a window, evenly spread over those that it has
SHOWN_IDS = 5  # of a target
WHAT = {"sampled": "{} draws", "top_k": "{} ids", "hidden": "hidden states of {} channels"}


def inspect_windows(path: str, samples: int, tokenizer: str | None, console: Console) -> None:
    """Print windows that are spread over a store, and some of their targets.

    Args:
        path: directory of the store.
        samples: number of windows.
        tokenizer: a Hugging Face tokenizer directory; None for the one that the manifest names.
        console: where to print.

    Raises:
        ValueError: if the store is damaged or not complete, or the tokenizer is missing or another one.
    """
    store = TeacherStore(path)
    manifest, fast = store.manifest, tokenizer_of(path, tokenizer)
    what = f"{WHAT[manifest.codec].format(manifest.num)} at temperature {manifest.temperature:g}"
    for number in np.linspace(0, len(store) - 1, min(samples, len(store))).round().astype(int).tolist():
        window = store.window(number)
        length, num_targets = len(window["loss_mask"]), int(window["loss_mask"].sum())
        console.rule(
            f"window {number + 1:,} of {len(store):,}: {length:,} tokens, {num_targets:,} with targets: {what}"
        )
        counts = np.append(0, window["loss_mask"])  # a mask is of labels, and the first token is none
        shown = texts(fast, window["tokens"][:MAX_TOKENS].tolist(), counts)
        print_tokens(console, shown, True, max(length + 1 - MAX_TOKENS, 0))
        for line in _targets(manifest, window, fast):
            console.print(Text(line), soft_wrap=True)


def _targets(manifest: Manifest, window: Arrays, fast: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield a line about each of some tokens with targets: token, its log-probability, entropy, likely ids."""
    positions = np.flatnonzero(window["loss_mask"])
    if not len(positions):
        yield "no token has targets"
        return
    yield f"{'position':>8}  {'token':20}  {'its log p':>9}  {'entropy':>7}  the teacher's"
    for row in np.linspace(0, len(positions) - 1, min(SHOWN_TARGETS, len(positions))).round().astype(int).tolist():
        position = int(positions[row]) + 1
        token = _quoted(fast, int(window["tokens"][position]))
        numbers = f"{window['label_logprob'][row]:9.3f}  {window['entropy'][row]:7.3f}"
        yield f"{position:8}  {token:20}  {numbers}  {_likely(manifest, window, row, fast)}"


def _likely(manifest: Manifest, window: Arrays, row: int, fast: tokenizers.Tokenizer) -> str:
    """Return the likely ids of a target, the most likely first, with their draws or their probability at T."""
    if manifest.codec == "hidden":
        return _quoted(fast, int(window["top1"][row]))
    ids = window["ids"][row]
    there = np.flatnonzero(ids >= 0)
    weights = window["counts" if manifest.codec == "sampled" else "logprobs"][row]
    first = there[np.argsort(-weights[there], kind="stable")]
    shares = [
        f"{weights[i]}/{manifest.num}" if manifest.codec == "sampled" else f"{math.exp(weights[i]):.1%}" for i in first
    ]
    named = [
        f"{_quoted(fast, int(ids[i]))} {share}" for i, share in zip(first[:SHOWN_IDS], shares[:SHOWN_IDS], strict=True)
    ]
    more = [f"{len(first) - SHOWN_IDS} more"] if len(first) > SHOWN_IDS else []
    rest = [f"all others {math.exp(window['tail'][row]):.1%}"] if manifest.codec == "top_k" else []
    return ", ".join(named + more + rest)


def _quoted(fast: tokenizers.Tokenizer, token: int) -> str:
    """Return a token's text in quotes, in which nothing steers the terminal."""
    return json.dumps(fast.decode([token], skip_special_tokens=False), ensure_ascii=False).translate(CONTROLS)

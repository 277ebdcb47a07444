"""Bytes of a token in teacher stores, and the rate of reading: `python -m benchmarks.teacher_store`.

Writes results/teacher_store_*.json and docs/teacher_store.md's table. The teacher's distributions are Zipf's with
exponent 1.5, of 3.2 nats at V = 151,936, over ids in random order; draws are systematic.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import write_result
from distill_nemo.data.stored_windows import StoredWindows
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import finish_store
from tests.stores import write_windows

PAGE = Path(__file__).parents[1] / "docs" / "teacher_store.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
LENGTH, WINDOWS, EXPONENT = 1024, 16, 1.5
CODECS = {"sampled, N = 12": ("sampled", 12), "sampled, N = 50": ("sampled", 50), "top_k, k = 50": ("top_k", 50)}
CODECS |= {"hidden, H = 4,096, bf16": ("hidden", 4096)}
VOCABULARIES = 2048, 151_936
OTHERS = {  # bytes of a token; `teacher_store.md` names the sources
    "Megatron-LM, k = 50": lambda _: 4.125 * 50,
    "DistillKit, k = 50": lambda _: 121.0,
    "raw bf16 logits": lambda vocabulary: 2.0 * vocabulary,
}


def window_of(manifest: Manifest, number: int) -> Arrays:
    """Return a window in which every token counts."""
    random, length = np.random.default_rng(number), manifest.sequence_length
    p = np.arange(1, manifest.vocab_size + 1) ** -EXPONENT
    p /= p.sum()
    names = random.permutation(manifest.vocab_size).astype(np.int32)
    entropy = -(p * np.log(p)).sum()
    window: Arrays = {
        "tokens": random.integers(0, manifest.vocab_size, length + 1, dtype=np.int32),
        "loss_mask": np.ones(length, np.uint8),
        "entropy": np.full(length, entropy, np.float32),
        "label_logprob": np.full(length, -entropy, np.float32),
        "top1": np.full(length, names[0], np.int32),
    }
    if manifest.codec == "hidden":
        return window | {"hidden": random.integers(0, 2**16, (length, manifest.num), dtype=np.uint16)}
    if manifest.codec == "top_k":
        logprobs = np.tile(np.log(p[: manifest.num]), (length, 1)).astype(np.float32)
        tail = np.full(length, np.log(p[manifest.num :].sum()), np.float32)
        return window | {"ids": np.tile(names[: manifest.num], (length, 1)), "logprobs": logprobs, "tail": tail}
    ids = np.full((length, manifest.num), -1, np.int32)
    counts = np.zeros((length, manifest.num), np.int32)
    ends = np.cumsum(p)
    for row in range(length):
        drawn = np.searchsorted(ends, (random.random() + np.arange(manifest.num)) / manifest.num)
        chosen, times = np.unique(drawn.clip(max=manifest.vocab_size - 1), return_counts=True)
        ids[row, : len(chosen)], counts[row, : len(chosen)] = names[chosen], times
    return window | {"ids": ids, "counts": counts}


def measured(codec: str, num: int, vocabulary: int, length: int = LENGTH, windows: int = WINDOWS) -> dict[str, float]:
    """Return the bytes of a token, all that is in the shards, and the tokens that one process reads in a second."""
    manifest = Manifest(codec, num, 1.0, vocabulary, length, windows, windows, 1, "bfloat16")  # pyright: ignore
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory, "store")
        write_windows(store, manifest, [window_of(manifest, number) for number in range(windows)])
        assert finish_store(store)
        samples, order = StoredWindows(str(store), True), np.random.default_rng(0).permutation(windows)
        size = sum(path.stat().st_size for path in TeacherStore(store).sums if path.name.startswith("shard"))
        rates = []
        for _ in range(3):
            began = time.perf_counter()
            for number in order:
                samples[int(number)]
            rates.append(windows * length / (time.perf_counter() - began))
    return {"bytes": size / (windows * length), "tokens_per_second": max(rates)}


def main() -> None:
    """Measure every codec at every vocabulary."""
    found = {name: {v: measured(*which, v) for v in VOCABULARIES} for name, which in CODECS.items()}
    short = measured(*CODECS["sampled, N = 50"], VOCABULARIES[0], length=128, windows=256)
    shape = {"length": LENGTH, "exponent": EXPONENT}
    write_result("teacher_store", {"shape": shape, "codecs": found, "windows of 128 tokens": short})
    rates = {name: f"{each[VOCABULARIES[-1]]['tokens_per_second']:,.0f}" for name, each in found.items()}
    rows = [[name, *(f"{found[name][v]['bytes']:,.1f}" for v in VOCABULARIES), rate] for name, rate in rates.items()]
    rows += [[name, *(f"{of(v):,.1f}" for v in VOCABULARIES), ""] for name, of in OTHERS.items()]
    head = ["bytes a token", *(f"V = {v:,}" for v in VOCABULARIES), "read, tokens/s"]
    lines = [f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows]]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "".join(lines) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()

"""Cost of teacher stores: bytes of a token, the rate of reading, and steps from one: results/teacher_store_*.json.

The teacher's distributions are Zipf's with exponent 1.5, of 3.2 nats at V = 151,936, over ids in random order; draws
are systematic. Steps are those of the quickstart's pair, on random tokens.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import interleaved, write_result
from benchmarks.step import OURS, STUDENT, Shape, run_config, stepper
from distill_nemo.config import ParallelismConfig
from distill_nemo.data.stored_windows import StoredWindows
from distill_nemo.models.distillation.stored_targets import StoredTeacher
from distill_nemo.runtime.device import setup_device
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import finish_store
from tests.stores import write_windows

QUICKSTART = Shape((4, 256, 8), (2, 128, 4), 2048, 128, 8)
STORED, SAMPLED, DRAWS = "stored targets", "sampled, N = 50", 50
LENGTH, WINDOWS, EXPONENT = 1024, 16, 1.5
CODECS = {"sampled, N = 12": ("sampled", 12), SAMPLED: ("sampled", DRAWS), "top_k, k = 50": ("top_k", 50)}
CODECS |= {"hidden, H = 4,096, bf16": ("hidden", 4096)}
VOCABULARIES = 2048, 151_936
OTHERS = {  # bytes of a token
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
    """Return the bytes of a token, all that is in the shards, and the tokens that one process reads in a second.

    The files are in memory, so it reads in processor time.
    """
    manifest = Manifest(codec, num, 1.0, vocabulary, length, windows, windows, 1, "bfloat16")  # pyright: ignore
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory, "store")
        write_windows(store, manifest, [window_of(manifest, number) for number in range(windows)])
        assert finish_store(store)
        samples, order = StoredWindows(str(store), True), np.random.default_rng(0).permutation(windows)
        size = sum(path.stat().st_size for path in TeacherStore(store).sums if path.name.startswith("shard"))
        rates = []
        for _ in range(3):
            began = time.process_time()
            for number in order:
                samples[int(number)]
            rates.append(windows * length / (time.process_time() - began))
    return {"bytes": size / (windows * length), "tokens_per_second": max(rates)}


def compare_steps(repeats: int) -> dict[str, Any]:
    """Return seconds of a step from stored targets, beside online distillation and an LM loss of the same student."""
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    with process_groups(ParallelismConfig()), tempfile.TemporaryDirectory() as root:
        seed_everything(0)
        config = run_config(QUICKSTART, root)
        stored = StoredTeacher("sampled", 1.0, DRAWS, QUICKSTART.vocabulary)
        runs = {
            OURS: stepper(config),
            STUDENT: stepper(config, teacher=False),
            STORED: stepper(config, teacher=False, stored=stored),
        }
        for run in runs.values():
            run()
        ways = interleaved(runs, repeats, warm=True)
    return asdict(QUICKSTART) | {"tokens": QUICKSTART.tokens, "draws": DRAWS, "ways": ways}


def main() -> None:
    """Measure every codec at every vocabulary, and steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="of a step")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    setup_device()
    found = {name: {v: measured(*which, v) for v in VOCABULARIES} for name, which in CODECS.items()}
    others = {name: {v: {"bytes": of(v)} for v in VOCABULARIES} for name, of in OTHERS.items()}
    short = measured(*CODECS[SAMPLED], VOCABULARIES[0], length=QUICKSTART.length, windows=256)
    results = {"repeats": repeats, "length": LENGTH, "exponent": EXPONENT, "codecs": found | others}
    write_result("teacher_store", results | {"short windows": short, "step": compare_steps(repeats)})


if __name__ == "__main__":
    main()

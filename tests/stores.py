"""Teacher stores with made targets, for tests."""

from pathlib import Path

import numpy as np

from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.codecs.top_k import STEPS
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.output_layer import write_output_layer
from distill_nemo.teacher_store.writer import WrittenShards, claim_shard, create_store, finish_store

V, L = 512, 16


def manifest_of(codec: str = "sampled", **changed) -> Manifest:
    fields = {
        "num": {"sampled": 12, "top_k": 5, "hidden": 8}[codec],
        "temperature": 1.0,
        "vocab_size": V,
        "sequence_length": L,
        "num_windows": 10,
        "windows_per_shard": 4,
        "seed": 1,
        "dtype": "float32",
    }
    return Manifest(codec, **(fields | changed))  # pyright: ignore[reportArgumentType]


def random_window(manifest: Manifest, number: int) -> Arrays:
    """Return a window with targets drawn from its number, as a teacher's are."""
    random, length = np.random.default_rng(number), manifest.sequence_length
    window: Arrays = {"tokens": random.integers(0, manifest.vocab_size, length + 1, dtype=np.int32)}
    window["loss_mask"] = random.integers(0, 2, length, dtype=np.uint8)
    if manifest.documents_apart:
        begins = random.integers(0, 4, length) == 0
        window["document_starts"] = np.maximum.accumulate(np.where(begins, np.arange(length), 0)).astype(np.int32)
    count = int(window["loss_mask"].sum())
    p = random.dirichlet(np.full(manifest.vocab_size, 0.05), count)
    window["entropy"] = -(p * np.log(p.clip(1e-30))).sum(1).astype(np.float32)
    window["label_logprob"] = -random.random(count, np.float32)
    if manifest.temperature != 1:
        window["entropy_at_1"] = window["entropy"] / 2
    window["top1"] = p.argmax(1).astype(np.int32)
    return window | _targets(manifest, p, random)


def _targets(manifest: Manifest, p: np.ndarray, random: np.random.Generator) -> Arrays:
    count, num = len(p), manifest.num
    if manifest.codec == "hidden":
        states = random.standard_normal((count, num)).astype(np.float32)
        return {"hidden": _as_stored(manifest, states)}
    if manifest.codec == "top_k":
        ids = np.argsort(-p, axis=1)[:, :num].astype(np.int32)
        top = np.take_along_axis(p, ids, 1).clip(1e-30)
        tail = np.log((1 - top.sum(1)).clip(1e-30))
        logprobs = np.rint(np.log(top) * STEPS).clip(min=1 - 2**16) / STEPS
        return {"ids": ids, "logprobs": logprobs.astype(np.float32), "tail": tail.astype(np.float32)}
    width = min(num, manifest.vocab_size)
    ids, counts = np.full((count, width), -1, np.int32), np.zeros((count, width), np.int32)
    for row, drawn in enumerate(random.multinomial(num, p / p.sum(1, keepdims=True))):
        chosen = np.flatnonzero(drawn)
        ids[row, : len(chosen)], counts[row, : len(chosen)] = chosen, drawn[chosen]
    return {"ids": ids, "counts": counts}


def _as_stored(manifest: Manifest, values: np.ndarray) -> np.ndarray:
    return values if manifest.dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def write_windows(
    store: Path, manifest: Manifest, windows: list[Arrays], shards: list[int] | None = None, layer_seed: int = 0
) -> None:
    """Write some shards of a store, all by default, without completing it."""
    create_store(store, manifest)
    if manifest.codec == "hidden":
        weight = (
            np.random.default_rng(layer_seed).standard_normal((manifest.vocab_size, manifest.num)).astype(np.float32)
        )
        write_output_layer(store, manifest, _as_stored(manifest, weight), None)
    for shard in WrittenShards(store, manifest).missing() if shards is None else shards:
        writer = claim_shard(store, manifest, shard)
        assert writer is not None
        with writer:
            for number in writer.windows:
                writer.append(windows[number])
            writer.commit()


def write_store(store: Path, manifest: Manifest, layer_seed: int = 0) -> list[Arrays]:
    """Write a complete store of random windows. Return them."""
    windows = [random_window(manifest, number) for number in range(manifest.num_windows)]
    write_windows(store, manifest, windows, layer_seed=layer_seed)
    assert finish_store(store)
    return windows

"""A store's numbers of each token, from the teacher's logits, and windows as a store takes them."""

import numpy as np
import torch

from distill_nemo.data.samplers import TARGET
from distill_nemo.losses.stored import encode
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store_jobs.draws import uniforms
from distill_nemo.teacher_store_jobs.teacher_run import Chunk, Rows, Sample

UNIFORM = TARGET + "uniform"


def encode_chunk(manifest: Manifest, chunk: Chunk) -> Rows:
    """Return what a store with this manifest keeps of each token, [n, ...]."""
    labels_n, uniform_n = chunk.rows["labels"], chunk.rows[UNIFORM]
    coding = manifest.codec, manifest.num, manifest.temperature
    found = encode(*coding, chunk.logits_nv, labels_n, uniform_n, chunk.group, chunk.vocab_start)
    if manifest.codec == "hidden":
        return found | {"hidden": chunk.hidden_nH}
    widths = {name: field.shape[0] for name, field in manifest.coding.fields.items() if field.shape}
    return {name: x[:, : widths[name]] if name in widths else x for name, x in found.items()}


def with_uniforms(sample: Sample, seed: int, window: int) -> Sample:
    """Return a sample with the random numbers of its draws."""
    return sample | {UNIFORM: torch.from_numpy(uniforms(seed, window, len(sample["tokens"])))}


def window_of(sample: Sample, targets: Arrays, documents_apart: bool) -> Arrays:
    """Return a window as `ShardWriter.append` takes it."""
    window = {
        "tokens": torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy().astype(np.int32),
        "loss_mask": (sample["loss_mask"] > 0).numpy().astype(np.uint8),
    }
    if documents_apart:
        window["document_starts"] = sample["document_starts"].numpy().astype(np.int32)
    return window | targets

"""Scores and losses that an interrupted call left in its unfinished directory. Read and written on rank 0."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill_nemo.pruning.choice import Scores
from distill_nemo.runtime.files import write_atomically

PROGRESS = "progress"  # folder
FILE = "scores.safetensors"
OF_THE_MODEL, OF_LAYERS = ("hidden", "layers"), ("heads", "mamba", "ffn", "shared_ffn", "experts", "expert_ffn")


def write_progress(directory: Path, identity: str, scores: Scores, losses: list[float]) -> None:
    """Write all scores, and the held-out losses of the source and of the first candidates."""
    tensors = {name: vars(scores)[name] for name in OF_THE_MODEL}
    for part in OF_LAYERS:
        tensors |= {f"{part}.{layer}": value for layer, value in vars(scores)[part].items()}
    tensors = {name: each.contiguous() for name, each in tensors.items()}
    metadata = {"identity": identity, "losses": json.dumps(losses)}
    folder = directory / PROGRESS
    folder.mkdir(exist_ok=True)
    write_atomically(folder / FILE, save(tensors, metadata | {"sha256": _sha256(tensors, metadata)}))


def earlier_progress(directory: Path, identity: str) -> tuple[Scores, list[float]] | None:
    """Return what a call of the same identity wrote; None if there was no such call, or its file is damaged."""
    try:
        with safe_open(directory / PROGRESS / FILE, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    stated = metadata.pop("sha256", None)
    if metadata.get("identity") != identity or stated != _sha256(tensors, metadata):
        return None
    by_layer: dict[str, dict[int, Tensor]] = {part: {} for part in OF_LAYERS}
    for name in tensors.keys() - set(OF_THE_MODEL):
        part, layer = name.split(".")
        by_layer[part][int(layer)] = tensors[name]
    in_order = {part: dict(sorted(layers.items())) for part, layers in by_layer.items()}
    scores = Scores(hidden=tensors["hidden"], layers=tensors["layers"], **in_order)
    return scores, json.loads(metadata["losses"])


def _sha256(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return a hash of all that the file holds beside it."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() + save(tensors)).hexdigest()

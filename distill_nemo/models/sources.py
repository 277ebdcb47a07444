"""Tell the kinds of checkpoint directory apart."""

import enum
from dataclasses import dataclass
from pathlib import Path


class CheckpointKind(enum.Enum):
    """Who wrote the directory."""

    HUGGING_FACE = "Hugging Face"
    MEGATRON = "Megatron distributed"
    NEMO = "NeMo"
    OURS = "distill-nemo"


@dataclass(frozen=True)
class FoundCheckpoint:
    """Where the weights lie, and what their keys begin with."""

    kind: CheckpointKind
    weights: Path
    prefix: str = ""


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """Look into `path` and say what kind of checkpoint it is.

    Raises:
        ValueError: when it is missing or none of the kinds, saying what was looked for.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint directory not found: {path}")
    if (path / "checkpoints" / "latest").is_file():  # the output directory of a run of ours
        path = path / "checkpoints"
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text().strip()
    if (path / "architecture.json").is_file():
        return FoundCheckpoint(CheckpointKind.OURS, path, "model.")
    if (path / "model_weights").is_dir():
        return FoundCheckpoint(CheckpointKind.NEMO, path / "model_weights", "model.")
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        path = path / f"iter_{int(tracker.read_text()):07d}"
    if (path / ".metadata").is_file():
        return FoundCheckpoint(CheckpointKind.MEGATRON, path)
    if (path / "config.json").is_file():
        return FoundCheckpoint(CheckpointKind.HUGGING_FACE, path)
    raise ValueError(
        f"{path} is no checkpoint that can be read: expected config.json and *.safetensors (Hugging Face), .metadata "
        "(Megatron distributed), model_weights/ (NeMo), or architecture.json (a checkpoint of ours)"
    )

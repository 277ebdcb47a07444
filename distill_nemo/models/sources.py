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
    """Where the weights lie, and the file that states the architecture, if any does."""

    kind: CheckpointKind
    weights: Path
    description: Path | None


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """Look into `path` and say what kind of checkpoint it is.

    Raises:
        ValueError: when it is missing or none of the kinds, saying what was looked for.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint directory not found: {path}")
    stated = path / "model_config.yaml"
    description = stated if stated.is_file() else None
    if (path / "checkpoints" / "latest").is_file():  # the output directory of a run of ours
        path = path / "checkpoints"
    if (path / "latest").is_file() and not (path / "config.json").is_file():  # DeepSpeed writes one there
        path = path / (path / "latest").read_text().strip()
    if (path / "architecture.json").is_file():
        return FoundCheckpoint(CheckpointKind.OURS, path, path / "architecture.json")
    if (path / "model_weights").is_dir():
        return FoundCheckpoint(CheckpointKind.NEMO, path / "model_weights", description)
    path = _newest_iteration(path)
    if (path / ".metadata").is_file():
        return FoundCheckpoint(CheckpointKind.MEGATRON, path, description)
    if (path / "config.json").is_file():
        return FoundCheckpoint(CheckpointKind.HUGGING_FACE, path, path / "config.json")
    raise ValueError(
        f"{path} is no checkpoint that can be read: expected config.json and *.safetensors (Hugging Face), .metadata "
        "(Megatron distributed), model_weights/ (NeMo), or architecture.json (a checkpoint of ours)"
    )


def _newest_iteration(path: Path) -> Path:
    """What Megatron's tracker file names: an iteration, or `release` for converted weights."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return path
    named = tracker.read_text().strip()
    if named != "release" and not named.isdecimal():
        raise ValueError(f'{tracker} must hold an iteration or "release", got "{named[:40]}"')
    return path / (named if named == "release" else f"iter_{int(named):07d}")

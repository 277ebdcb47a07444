"""Recognise checkpoint directories."""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distill_nemo.quantization import QuantizationConfig
from distill_nemo.runtime.files import read_object_if_any

OWN_FILES = ("architecture.json", "run.json", "SHA256SUMS")  # any one suffices: the others may be lost
QUANTIZATION = "quantization"  # key of a quantised student's format in architecture.json
MODELOPT_STATE = "modelopt_state"  # directory of ModelOpt's changes to a model; its quantizers have tensors too
STEP = re.compile(r"step_\d{8,}")


class Scales(NamedTuple):
    """Scales of a quantised tensor: their file, and the rows and columns that share one.

    `of_tensor` is the file of a further one, by which all are multiplied.
    """

    file: Path
    block: tuple[int, int]
    of_tensor: Path | None = None


class StoredTensor(NamedTuple):
    """An entry of a safetensors header, or a quantised tensor that several entries stand for.

    `name` is its name in the file, if the model's differs.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    scales: Scales | None = None
    name: str | None = None


class CheckpointKind(enum.Enum):
    """Format of a checkpoint directory."""

    HUGGING_FACE = "Hugging Face"
    MEGATRON = "Megatron distributed"
    NEMO = "NeMo"
    OURS = "distill-nemo"


@dataclass(frozen=True)
class FoundCheckpoint:
    """Directory of the weights, and the file that describes the architecture, if there is one."""

    kind: CheckpointKind
    weights: Path
    description: Path | None


@dataclass(frozen=True)
class Source:
    """The checkpoint that an architecture was read from.

    Args:
        checkpoint: path as the config states it.
        kind: format of the directory.
        weights: directory of its tensors.
        config: content of a Hugging Face `config.json`; empty for other kinds.
        vocab_size: number of rows that its description states, if any.
        quantization: how our run has quantised it; None: it has not.
        tensors: headers of its safetensors, once `check_hf_tensors` has compared them; empty for other kinds.
    """

    checkpoint: str
    kind: CheckpointKind
    weights: Path
    config: dict[str, Any]
    vocab_size: int | None
    quantization: QuantizationConfig | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)

    @property
    def modified_by_modelopt(self) -> bool:
        """True if ModelOpt changed the model (quantised it, say) before it was saved."""
        return (self.weights / MODELOPT_STATE).is_dir()


def has_tokenizer(directory: Path) -> bool:
    """Return True if a Hugging Face directory has a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """Find the checkpoint in `path` and its kind.

    Raises:
        ValueError: if it is missing or of no known kind. The message lists the files that were looked for.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint directory not found: {path}")
    stated = path / "model_config.yaml"
    description = stated if stated.is_file() else None
    if not (path / "config.json").is_file():
        steps = candidates(path / "checkpoints") or candidates(path)
        path = steps[0] if steps else path
    if any((path / name).exists() for name in OWN_FILES):
        return FoundCheckpoint(CheckpointKind.OURS, path, path / "architecture.json")
    if (path / "model_weights").is_dir():
        return FoundCheckpoint(CheckpointKind.NEMO, path / "model_weights", description)
    path = _newest_iteration(path)
    if (path / ".metadata").is_file():
        return FoundCheckpoint(CheckpointKind.MEGATRON, path, description)
    if (path / "config.json").is_file():
        return FoundCheckpoint(CheckpointKind.HUGGING_FACE, path, path / "config.json")
    raise ValueError(
        f"{path} is not a checkpoint that can be read: expected config.json and *.safetensors (Hugging Face), "
        ".metadata (Megatron distributed), model_weights/ (NeMo), or architecture.json (distill-nemo)"
    )


def is_quantized_already(found: FoundCheckpoint) -> bool:
    """Return True for a checkpoint of a student that our run or ModelOpt has quantised.

    Raises:
        ValueError: if its description is damaged.
    """
    if (found.weights / MODELOPT_STATE).is_dir():
        return True
    stated = read_object_if_any(found.weights / "architecture.json") if found.kind is CheckpointKind.OURS else {}
    return QUANTIZATION in stated


def saved_steps(root: Path) -> list[Path]:
    """Return the checkpoints that a run saved in `root`, newest first."""
    steps = [path for path in root.glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)


def candidates(root: Path) -> list[Path]:
    """Return the checkpoints to resume from, newest first: that named by `latest` and older ones, else all."""
    steps = saved_steps(root)
    named = _named_by_tracker(root)
    return steps[steps.index(named) :] if named in steps else steps


def tracker_fault(root: Path) -> str | None:
    """Return the reason why `latest` cannot be followed; None if it can, or if nothing was saved."""
    tracker, steps = root / "latest", saved_steps(root)
    if _named_by_tracker(root) in steps or not (steps or tracker.exists() or tracker.is_symlink()):
        return None
    if not tracker.is_file():
        return f"{tracker} is {'not a file' if tracker.exists() or tracker.is_symlink() else 'missing'}"
    return f"{tracker} does not name an existing checkpoint"


def _named_by_tracker(root: Path) -> Path | None:
    tracker = root / "latest"
    try:
        if not tracker.is_file():  # opening a pipe would wait for its writer
            return None
        with tracker.open("rb") as file:
            name = file.read(64).decode().strip()
    except (OSError, ValueError):
        return None
    return root / name if STEP.fullmatch(name) else None


def _newest_iteration(path: Path) -> Path:
    """Return the directory that Megatron's tracker file names: an iteration, or `release` for converted weights."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return path
    with tracker.open(errors="replace") as file:
        named = file.read(64).strip()
    if named != "release" and not re.fullmatch("[0-9]{1,18}", named):
        raise ValueError(f'{tracker} must hold an iteration or "release", got "{named[:40]}"')
    return path / (named if named == "release" else f"iter_{int(named):07d}")

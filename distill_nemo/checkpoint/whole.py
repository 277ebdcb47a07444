"""Find damage in a checkpoint: files that its format needs and that are missing, or that differ from their sums."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill_nemo.checkpoint.directory import read_record
from distill_nemo.models.checkpoints.megatron import is_extra
from distill_nemo.models.sources import MODELOPT_STATE
from distill_nemo.runtime.checksums import SUMS, read_sums, sha256
from distill_nemo.runtime.files import read_object
from distill_nemo.runtime.pickles import read_contents
from distill_nemo.runtime.process_groups import of_all_ranks


def damages(directory: Path) -> list[str]:
    """Return the damages of a checkpoint, the same on every rank.

    Collectives: one broadcast of the sums and one all-gather of messages; every rank must call it.
    """
    agreed: list[Any] = [_sums(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(agreed, src=0)
    if isinstance(agreed[0], str):
        return [agreed[0]]
    mine = list(agreed[0].items())[dist.get_rank() :: dist.get_world_size()]
    own = [damage for name, expected in mine if (damage := _damage(directory, name, expected))]
    return sorted(damage for of_rank in of_all_ranks(own) for damage in of_rank)


def _sums(directory: Path) -> dict[str, str] | str:
    """Return the sums of a checkpoint if they name every file that it needs, else a description of the damage."""
    try:
        sums = read_sums(directory / SUMS)
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read ({error})"
    for name in ("run.json", "architecture.json", ".metadata", f"{MODELOPT_STATE}/.metadata"):
        if name in sums and (damage := _damage(directory, name, sums[name])):
            return damage
    try:
        unnamed = sorted(_needed(directory) - sums.keys())
    except ValueError as error:
        return str(error)
    return f"{SUMS} does not name {', '.join(unnamed[:3])}" if unnamed else sums


def _needed(directory: Path) -> set[str]:
    """Return the files that make up a checkpoint, besides its sums.

    Raises:
        ValueError: if a file that lists them is damaged.
    """
    read_record(directory)
    read_object(directory / "architecture.json")
    needed = {"run.json", "architecture.json", *_distributed(directory)}
    if any(is_extra(name.split("/")[0]) for name in read_contents(directory).state_dict_metadata):
        needed |= {f"{MODELOPT_STATE}/{name}" for name in _distributed(directory / MODELOPT_STATE)}
    return needed


def _distributed(directory: Path) -> set[str]:
    """Return the files of one of Megatron's distributed checkpoints."""
    stored = read_contents(directory).storage_data or {}
    try:
        return {".metadata", "metadata.json", *(str(part.relative_path) for part in stored.values())}
    except AttributeError as error:
        raise ValueError(f"{directory}/.metadata is corrupt: {error}") from None


def _damage(directory: Path, name: str, expected: str) -> str | None:
    try:
        return None if sha256(directory / name) == expected else f"{name} is not what was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"

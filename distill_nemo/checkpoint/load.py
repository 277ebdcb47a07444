"""Go on from a checkpoint, at the layout it was saved at or another."""

import sys
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from distill_nemo.checkpoint.directory import candidates
from distill_nemo.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    restore_rng,
    rng_layout,
    rng_state,
    sharded_state,
)
from distill_nemo.config import ModelConfig, first_few
from distill_nemo.models.sources import CheckpointKind, find_checkpoint
from distill_nemo.runtime.checksums import damages
from distill_nemo.runtime.pickles import check_contents
from distill_nemo.runtime.process_groups import rank

MAX_LISTED = 3


def newest_whole(root: Path) -> Path | None:
    """The newest checkpoint whose files are what was written, or None where no run has saved; every rank must call it.

    One that is damaged is named on stderr, and the one before it taken.

    Raises:
        ValueError: when all are damaged.
    """
    found = candidates(root)
    for directory in found:
        wrong = damages(directory)
        if not wrong:
            return directory
        if rank() == 0:
            said = "; ".join(first_few(wrong, MAX_LISTED))
            print(f"warning: {directory} is damaged: {said}", file=sys.stderr, flush=True)
    if found:
        raise ValueError(f"no checkpoint in {root} is whole: choose another output_dir, or restore one of them")
    return None


def check_whole(*models: ModelConfig | None) -> None:
    """Refuse models from a run of ours whose files are not what was written; every rank must call it.

    Raises:
        ValueError: naming the files.
    """
    for checkpoint in (model.checkpoint for model in models if model is not None and model.checkpoint):
        found = find_checkpoint(Path(checkpoint))
        if found.kind is CheckpointKind.OURS and (wrong := damages(found.weights)):
            said = "; ".join(first_few(wrong, MAX_LISTED))
            raise ValueError(f"{found.weights} is damaged: {said}; name another step")


def load_checkpoint(directory: Path, chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore everything; every rank must call it.

    At the layout of saving the run goes on bit for bit. At another, weights and optimizer are resharded and the random
    generators keep the seed they have, which no supported model uses after initialisation.

    Returns:
        The run's state: step, consumed samples, tokens.
    """
    check_contents(directory / ".metadata")
    wanted = sharded_state(chunks, optimizer, scheduler, loading=True)
    same_layout = tuple(dist_checkpointing.load_common_state_dict(str(directory))["rng_layout"]) == rng_layout()[0]
    if same_layout:
        wanted["rng"] = rng_state()
    elif rank() == 0:
        print(f"{directory.name} was saved at another layout: resharding", flush=True)
    loaded: Any = dist_checkpointing.load(wanted, str(directory))
    load_model_state(chunks, loaded["weights"])
    load_optimizer_state(optimizer, loaded["optimizer"], loaded["run_state"]["step"])
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        restore_rng(loaded["rng"])
    return loaded["run_state"]

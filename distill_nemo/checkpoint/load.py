"""Resume from a checkpoint, at the layout at which it was saved or another."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from distill_nemo.checkpoint.state import (
    RANDOM_STATE,
    load_model_state,
    load_optimizer_state,
    random_state,
    restore_random_state,
    rng_layout,
    sharded_state,
)
from distill_nemo.checkpoint.whole import damages
from distill_nemo.fields import first_few
from distill_nemo.models.sources import CheckpointKind, candidates, find_checkpoint, tracker_fault
from distill_nemo.runtime.pickles import read_contents, weights_only
from distill_nemo.runtime.process_groups import rank


def newest_whole(root: Path) -> Path | None:
    """Return the newest checkpoint whose files match their sums, or None if no run has saved. Collective.

    A damaged checkpoint is reported on stderr and the one before it is tried. A `latest` that names no checkpoint is
    reported too.

    Raises:
        ValueError: if all are damaged.
    """
    of_rank_0: list[Any] = [(candidates(root), tracker_fault(root)) if rank() == 0 else None]
    dist.broadcast_object_list(of_rank_0, src=0)
    found, fault = of_rank_0[0]
    if fault:
        _warn(f"{fault}: using the newest whole checkpoint")
    for directory in found:
        wrong = damages(directory)
        if not wrong:
            return directory
        _warn(f"{directory} is damaged: {'; '.join(first_few(wrong))}")
    if found or fault:
        raise ValueError(
            f"no checkpoint in {root} is whole: restore one of them, choose another output_dir, or delete {root} to "
            "start from step 0"
        )
    return None


def check_whole(*checkpoints: str | None) -> None:
    """Refuse models from our runs whose files do not match their sums. Collective: every rank must call it.

    Raises:
        ValueError: naming the files.
    """
    for checkpoint in filter(None, checkpoints):
        found = find_checkpoint(Path(checkpoint))
        if found.kind is not CheckpointKind.OURS:
            continue
        if wrong := damages(found.weights):
            problems = "; ".join(first_few(wrong))
            raise ValueError(f"{found.weights} is damaged: {problems}; name another step")
        if found.weights != Path(checkpoint) and (fault := tracker_fault(found.weights.parent)):
            _warn(f"{fault}: using {found.weights}")


def _warn(message: str) -> None:
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def load_checkpoint(directory: Path, chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore everything. Collective: every rank must call it. Only tensors and plain values are read.

    At the layout of saving, the run continues bit for bit. At another, weights and optimizer are resharded. The random
    generators then keep their state, which no supported model uses after initialisation.

    Returns:
        The run's state: step, consumed samples, tokens.

    Raises:
        ValueError: if the checkpoint holds other objects, or does not fit.
    """
    stored = read_contents(directory).state_dict_metadata
    with weights_only(directory):
        wanted = sharded_state(chunks, optimizer, scheduler, loading=True)
        layout = dist_checkpointing.load_common_state_dict(str(directory))["rng_layout"]
        if tuple(layout) != rng_layout()[0]:
            _print(f"{directory.name} was saved at another layout: resharding")
        elif not any(name.startswith(f"{RANDOM_STATE}/") for name in stored):
            _print(f"{directory.name} is of an older version and holds its random state as a pickle, which is not read")
        else:
            wanted[RANDOM_STATE] = random_state()
        loaded: Any = dist_checkpointing.load(wanted, str(directory))
    load_model_state(chunks, loaded["weights"])
    load_optimizer_state(optimizer, loaded["optimizer"], loaded["run_state"]["step"])
    scheduler.load_state_dict(loaded["scheduler"])
    if RANDOM_STATE in loaded:
        restore_random_state(loaded[RANDOM_STATE])
    return loaded["run_state"]


def _print(message: str) -> None:
    if rank() == 0:
        print(message, flush=True)

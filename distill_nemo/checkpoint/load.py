"""Go on from a checkpoint, at the layout it was saved at or another."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from distill_nemo.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    restore_rng,
    rng_layout,
    rng_state,
    sharded_state,
)
from distill_nemo.runtime.process_groups import rank


def load_checkpoint(directory: Path, chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore everything; every rank must call it.

    At the layout of saving the run goes on bit for bit. At another, weights and optimizer are resharded and the random
    generators keep the seed they have, which no supported model uses after initialisation.

    Returns:
        The run's state: step, consumed samples, tokens.
    """
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

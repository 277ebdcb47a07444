"""Everything that a resumed run needs, in the form that Megatron's distributed checkpointing saves and reshards."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn

PREFIX = "model."
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}  # the one kind that any layout can load


def sharded_state(model: Any, optimizer: Any, scheduler: Any, loading: bool) -> dict[str, Any]:
    """Model, optimizer, schedule; the model's keys begin with `model.`."""
    weights = model_state(model)
    kept = optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=OPTIMIZER_METADATA)
    return {"weights": weights, "optimizer": kept, "scheduler": scheduler.state_dict()}


def model_state(model: Any) -> dict[str, Any]:
    """The student's sharded tensors (and projections), without Transformer Engine's empty extra states."""
    state = model.sharded_state_dict(prefix=PREFIX, metadata=OPTIMIZER_METADATA)
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put loaded tensors back."""
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()}, strict=False)


def rng_state() -> ShardedObject:
    """This rank's generators; only the same layout can load them."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape, offset = rng_layout()
    return ShardedObject("rng", state, shape, offset, replica_id=0)


def rng_layout() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of ranks along (pipeline, tensor, data), and this one's place."""
    p = parallel_state
    sizes = (
        p.get_pipeline_model_parallel_world_size(),
        p.get_tensor_model_parallel_world_size(),
        p.get_data_parallel_world_size(),
    )
    places = (
        p.get_pipeline_model_parallel_rank(),
        p.get_tensor_model_parallel_rank(),
        p.get_data_parallel_rank(),
    )
    return sizes, places


def restore_rng(state: dict[str, Any]) -> None:
    """Undo `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"]) if torch.cuda.is_available() else None
    get_cuda_rng_tracker().set_states(state["tracker"])

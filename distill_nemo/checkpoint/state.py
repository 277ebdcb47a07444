"""Everything that a resumed run needs, in the form that Megatron's distributed checkpointing saves and reshards."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn

from distill_nemo.models.checkpoints.megatron import is_extra
from distill_nemo.models.checkpoints.modelopt_state import is_modified

PREFIX = "model."
RANDOM_STATE = "random_state"  # `rng` of the first release is a pickle
CONFIGURED = ("max_lr", "min_lr", "betas", "eps", "fused")  # of all groups of parameters alike; fused: torch's Adam


def _metadata() -> dict[str, Any]:
    """Metadata for Megatron: which ranks hold copies, and the kind of optimizer state that any layout can load."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {
        "dp_cp_group": group,
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered by gloo in the memory of one host; else on every GPU, 8 bytes a parameter that nobody has planned.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def sharded_state(chunks: list[Any], optimizer: Any, scheduler: Any, loading: bool) -> dict[str, Any]:
    """Model, optimizer, schedule; the model's keys begin with `model.`, whatever the chunk."""
    if loading:
        _allocate_adam_state(optimizer)
    weights = {f"chunk_{i}": model_state(chunk) for i, chunk in enumerate(chunks)}
    kept = optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=_metadata())
    for state in _nested(kept, "state"):
        if isinstance(state, dict) and "common_step" in state:
            state["common_step"] = state["common_step"].cpu()  # loaded on the device that it was saved from
    return {"weights": weights, "optimizer": kept, "scheduler": scheduler.state_dict()}


def torch_adams(optimizer: Any) -> list[Any]:
    """The torch Adams inside; Transformer Engine's and Apex's keep the step elsewhere and need no help."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _allocate_adam_state(optimizer: Any) -> None:
    """Megatron describes what to load by the optimizer's state, which torch's Adam has only after its first step."""
    for adam in torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any], step: int) -> None:
    """`optimizer.load_state_dict`, right for torch's Adam too.

    Megatron-Core 0.19 looks for Adam's step among the tensors it copies, where it is not, and then gives all parameters
    one step tensor, which Adam would advance once per parameter. What the optimizer was configured with stays: Megatron
    takes the saved values, and does not find the groups of parameters where learning rates differ.
    """
    for groups in _nested(state, "param_groups"):
        for group in groups:
            group.update({name: x for name, x in optimizer.param_groups[0].items() if name in CONFIGURED})
            if "step" in group:  # a float of torch's Adam, which Transformer Engine's does not take
                group["step"] = int(group["step"])
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        copy = getattr(part, "_set_main_param_and_optimizer_states", None)
        if copy is not None:
            part._set_main_param_and_optimizer_states = _ignoring_step(copy)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.__dict__.pop("_set_main_param_and_optimizer_states", None)
    for adam in torch_adams(optimizer):
        for parameter, moments in adam.state.items():
            moments["step"] = torch.tensor(float(step), device=parameter.device)


def _nested(state: Any, name: str) -> Iterator[Any]:
    """Every value of that name in the state of an optimizer, or of several that are chained."""
    if isinstance(state, dict):
        if name in state:
            yield state[name]
        for part in state.values():
            yield from _nested(part, name)
    elif isinstance(state, list):
        for part in state:
            yield from _nested(part, name)


def _ignoring_step(copy: Any) -> Any:
    return lambda parameter, tensors: copy(parameter, {"step": None, **tensors})


def model_state(model: Any) -> dict[str, Any]:
    """The student's sharded tensors (and projections); of the extra states quantizers', as others are empty."""
    state = model.sharded_state_dict(prefix=PREFIX, metadata=_metadata())
    keep = is_modified(model)
    return {name: value for name, value in state.items() if keep or not is_extra(name)}


def load_model_state(chunks: list[nn.Module], state: dict[str, Any]) -> None:
    """Put loaded tensors back."""
    for i, chunk in enumerate(chunks):
        loaded = {name.removeprefix(PREFIX): value for name, value in state[f"chunk_{i}"].items()}
        chunk.load_state_dict(loaded, strict=False)


def random_state() -> ShardedObject:
    """Return the state of this rank's generators, as tensors and numbers; only the same layout can load it."""
    _, key, *position = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [np.asarray(key).tolist(), *position],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    shape, offset = rng_layout()
    return ShardedObject(RANDOM_STATE, state, shape, offset, replica_id=0)


def rng_layout() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of ranks along (pipeline, tensor, data and context), and this one's place."""
    p = parallel_state
    sizes = (
        p.get_pipeline_model_parallel_world_size(),
        p.get_tensor_model_parallel_world_size(),
        p.get_data_parallel_world_size(with_context_parallel=True),
    )
    places = (
        p.get_pipeline_model_parallel_rank(),
        p.get_tensor_model_parallel_rank(),
        p.get_data_parallel_rank(with_context_parallel=True),
    )
    return sizes, places


def restore_random_state(state: dict[str, Any]) -> None:
    """Set this rank's generators to what `random_state` held."""
    random.setstate(state["python"])
    key, *position = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), *position))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"]) if torch.cuda.is_available() else None
    _tracker().set_states(state["tracker"])


def _tracker() -> Any:
    return get_cuda_rng_tracker()

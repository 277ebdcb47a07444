"""The state of a run, in the form that Megatron's distributed checkpointing saves and reshards."""

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
from distill_nemo.models.quantizers.state import with_amaxes

PREFIX = "model."
RANDOM_STATE = "random_state"  # the first release's `rng` is a pickle
CONFIGURED = ("max_lr", "min_lr", "betas", "eps", "fused")  # equal in all groups of parameters; fused: torch's Adam


def _metadata() -> dict[str, Any]:
    """Return Megatron's metadata: the ranks that hold copies, and an optimizer state that any layout can load."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {
        "dp_cp_group": group,
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathers by gloo in the memory of one host; else on every GPU, for 8 bytes per parameter that no plan includes.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def sharded_state(chunks: list[Any], optimizer: Any, scheduler: Any, loading: bool) -> dict[str, Any]:
    """Return the state of model, optimizer and schedule; the model's keys begin with `model.` in every chunk."""
    if loading:
        _allocate_adam_state(optimizer)
    weights = {f"chunk_{i}": model_state(chunk) for i, chunk in enumerate(chunks)}
    kept = optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=_metadata())
    for state in _nested(kept, "state"):
        if isinstance(state, dict) and "common_step" in state:
            state["common_step"] = state["common_step"].cpu()  # or it is loaded on the device it was saved from
    return {"weights": weights, "optimizer": kept, "scheduler": scheduler.state_dict()}


def torch_adams(optimizer: Any) -> list[Any]:
    """Return the torch Adams inside. Transformer Engine's and Apex's keep the step elsewhere and need no help."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _allocate_adam_state(optimizer: Any) -> None:
    """Create Adam's state, which tells Megatron what to load and which torch creates only at the first step."""
    for adam in torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any], step: int) -> None:
    """Call `optimizer.load_state_dict`, with corrections for torch's Adam.

    Megatron-Core 0.19 looks for Adam's step among the tensors that it copies, where it is not. It then gives all
    parameters one step tensor, which Adam would advance once per parameter. It also restores the saved settings, and
    does not find the groups of parameters if learning rates differ, so the present settings are kept.
    """
    for groups in _nested(state, "param_groups"):
        for group in groups:
            group.update({name: x for name, x in optimizer.param_groups[0].items() if name in CONFIGURED})
            if "step" in group:  # torch's Adam saves a float, which Transformer Engine's does not accept
                group["step"] = int(group["step"])
            elif not torch_adams(optimizer):  # a torch Adam that is not distributed saves it with the moments
                group["step"] = step
    for moments in _nested(state, "state") if not torch_adams(optimizer) else ():
        moments.pop("common_step", None)
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
    """Yield every value of this name in the state of an optimizer, or of several that are chained."""
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
    """Return the student's sharded tensors and projections. Of the extra states only quantizers' are not empty."""
    state = model.sharded_state_dict(prefix=PREFIX, metadata=_metadata())
    keep = is_modified(model)
    if not keep:
        state = with_amaxes(model, state, PREFIX)
    return {name: value for name, value in state.items() if keep or not is_extra(name)}


def load_model_state(chunks: list[nn.Module], state: dict[str, Any]) -> None:
    """Load tensors into the chunks."""
    for i, chunk in enumerate(chunks):
        loaded = {name.removeprefix(PREFIX): value for name, value in state[f"chunk_{i}"].items()}
        chunk.load_state_dict(loaded, strict=False)


def random_state() -> ShardedObject:
    """Return the state of this rank's generators as tensors and numbers. Only the same layout can load it."""
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
    """Return the number of ranks along (pipeline, tensor, data and context), and this rank's place."""
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
    """Set this rank's generators to a state that `random_state` returned; a GPU's only to a GPU's."""
    random.setstate(state["python"])
    key, *position = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"].shape != torch.cuda.get_rng_state().shape:  # of a CPU: a run may go on where there is a GPU
        return
    torch.cuda.set_rng_state(state["cuda"]) if torch.cuda.is_available() else None
    _tracker().set_states(state["tracker"])


def _tracker() -> Any:
    return get_cuda_rng_tracker()

"""Weights from Megatron distributed checkpoints: Megatron's, NeMo's and our own, saved at any layout."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

MAX_LISTED = 5


def load_megatron_weights(directory: Path, built: nn.Module, prefix: str = "") -> None:
    """Fill this stage of `built`, resharding as needed.

    Layer norms are stored under Transformer Engine's fused names by every layer spec (Megatron maps them), so
    checkpoints written with Transformer Engine and with the local layers look alike; older local ones are renamed.

    Args:
        directory: holds `.metadata`.
        built: this tensor- and pipeline-parallel part of the model.
        prefix: what the keys in the checkpoint begin with.

    Raises:
        ValueError: when a tensor is missing, extra or of another shape, by name.
    """
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(directory))
    except Exception as error:
        raise ValueError(f"{directory} is no readable Megatron distributed checkpoint: {error}") from None
    model: Any = built
    wanted = model.sharded_state_dict(prefix=prefix)
    wanted = {name: value for name, value in wanted.items() if not name.endswith("_extra_state")}
    _rename_legacy_norms(wanted, stored)
    tensors = [value for value in nested_values(wanted) if isinstance(value, ShardedTensor)]
    problems = [f"missing: {t.key}" for t in tensors if t.key not in stored]
    problems += [
        f"{t.key} has shape {tuple(stored[t.key].global_shape)}, needs {tuple(t.global_shape)}"
        for t in tensors
        if t.key in stored and tuple(stored[t.key].global_shape) != tuple(t.global_shape)
    ]
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(f"{directory} does not fit the model:\n  " + "\n  ".join(problems[:MAX_LISTED]) + more)
    loaded: Any = dist_checkpointing.load(wanted, str(directory))
    state = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
    model.load_state_dict(state, strict=False)


LEGACY = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def _rename_legacy_norms(wanted: Any, stored: Any) -> None:
    """Ask for a layer norm under the local layers' own name where the checkpoint has it so."""
    for tensor in nested_values(wanted):
        key = getattr(tensor, "key", "")
        for fused, own in LEGACY.items():
            if fused in key and key not in stored and key.replace(fused, own) in stored:
                tensor.key = key.replace(fused, own)

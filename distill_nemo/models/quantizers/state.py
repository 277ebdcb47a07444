"""Keep amaxes in Megatron's checkpoints: each is split as its weight is, so that it reshards with it.

The amaxes of a weight's blocks have the weight's rows, and one column for each block. An amax of a row is equal on all
ranks that hold parts of it, and an amax of a tensor on all that hold parts of the tensor.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distill_nemo.models.quantizers.convert import Quantizer, quantizers_of
from distill_nemo.runtime.pickles import read_contents

AMAX = "._amax"


def is_amax(name: str) -> bool:
    """Return True for the name of a quantizer's amax in a state."""
    return name.endswith(f"_quantizer{AMAX}")


def with_amaxes(model: nn.Module, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a sharded state with the amaxes of the student's quantizers, in place of those that ModelOpt adds.

    Args:
        model: a model, or a distillation model.
        state: its sharded state.
        prefix: of the state's names.
    """
    plain = {name: value for name, value in state.items() if "_quantizer." not in name}
    return plain | {prefix + each.name + AMAX: _sharded(each, plain, prefix) for each in quantizers_of(model)}


def check_amaxes(directory: Path, state: Mapping[str, Any]) -> None:
    """Compare the amaxes in a sharded state with a checkpoint's table of contents.

    Raises:
        ValueError: if one is missing or has another shape, by name.
    """
    wanted = [value for name, value in state.items() if is_amax(name)]
    parts = [value.build() if isinstance(value, ShardedTensorFactory) else value for value in wanted]
    contents = read_contents(directory).state_dict_metadata if parts else {}
    for part in nested_values(parts):
        stored = contents.get(part.key)
        found = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
        if found != part.global_shape:
            raise ValueError(
                f"{directory} does not fit its quantization: {part.key} "
                + (f"has shape {found}, needs {part.global_shape}" if found else "is missing")
            )


def _sharded(quantizer: Quantizer, state: Mapping[str, Any], prefix: str) -> ShardedTensor | ShardedTensorFactory:
    weight = state[f"{prefix}{quantizer.layer_name}.weight"]
    key = f"{weight.key.removesuffix('weight')}{quantizer.name.rpartition('.')[2]}{AMAX}"
    amax = quantizer.amax
    if amax.ndim == 0:
        first = next(iter(nested_values(weight.build()))) if isinstance(weight, ShardedTensorFactory) else weight
        return _collapsed(first, key, amax.reshape(1), first.prepend_axis_num)
    amax = amax.reshape(len(quantizer.layer.get_parameter("weight")), -1)
    if isinstance(weight, ShardedTensorFactory):  # of rows
        return replace(weight, key=key, data=amax)
    if not quantizer.module.is_static_block_quant:
        return _collapsed(weight, key, amax, weight.prepend_axis_num + 1)
    numbers = weight.local_shape[1] // amax.shape[1]  # that share an amax
    *shape, columns = weight.global_shape
    *offset, column = weight.global_offset
    return _in_place_of(
        weight,
        key,
        amax,
        global_shape=(*shape, columns // numbers),
        global_offset=(*offset, column // numbers),
    )


def _in_place_of(weight: ShardedTensor, key: str, amax: Tensor, **place: Any) -> ShardedTensor:
    """Return an amax with its weight's entry, but for the fields of `place`."""
    return replace(weight, key=key, data=amax, dtype=amax.dtype, local_shape=tuple(amax.shape), **place)


def _collapsed(weight: ShardedTensor, key: str, amax: Tensor, axis: int) -> ShardedTensor:
    """Return an amax in the place of its weight, with the weight's axes from `axis` on replaced by one of size 1.

    Ranks that hold other parts along these axes hold copies.
    """
    fragments = weight.axis_fragmentations
    assert fragments is not None and isinstance(weight.replica_id, tuple)
    stage, copy, replica = weight.replica_id
    for i in range(axis, len(weight.global_shape)):
        copy += weight.global_offset[i] * fragments[i] // weight.global_shape[i]
    return _in_place_of(
        weight,
        key,
        amax,
        global_shape=(*weight.global_shape[:axis], 1),
        global_offset=(*weight.global_offset[:axis], 0),
        axis_fragmentations=(*fragments[:axis], 1),
        replica_id=(stage, copy, replica),
    )

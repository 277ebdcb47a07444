"""Checkpoints of parameters that hold several parts, each split over the tensor-parallel ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor


def in_parts(shard: ShardedTensor, rows: Sequence[int]) -> ShardedTensorFactory:
    """Store a rank's share of each part as rows of the whole tensor, in which the parts stand one after another.

    So a checkpoint has the same tensor at every tensor parallel size.

    Args:
        shard: consecutive rows of the tensor of all ranks, as Megatron takes them to be.
        rows: of this rank, in each part.
    """
    axis, own, tensor = shard.prepend_axis_num, sum(rows), shard.data
    assert tensor is not None and len(tensor) == own, (shard, rows)
    ranks, rank = shard.global_shape[axis] // own, shard.global_offset[axis] // own
    empty = shard.without_data()

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> dict[str, Any]:
        assert flattened_range is None, "Megatron has dropped it"
        parts, start = {}, 0
        for number, part in enumerate(tensor.split(list(rows))):
            offset = list(shard.global_offset)
            offset[axis] = start + rank * len(part)
            start += ranks * len(part)
            parts[str(number)] = replace(
                empty,
                key=key,
                data=part,
                dtype=part.dtype,
                local_shape=tuple(part.shape),
                global_offset=tuple(offset),
                axis_fragmentations=None,  # parts differ in size
                replica_id=replica_id,
            )
        return parts

    def merge(parts: dict[str, Any]) -> Tensor:
        return torch.cat([parts[str(number)] for number in range(len(rows))])

    return ShardedTensorFactory(shard.key, tensor, build, merge, shard.replica_id)

"""All collectives of the losses, and the merge of shards' log-sum-exps into that of the vocabulary.

Legend: S sequence (s: this rank's slice of it), B batch, R ranks that share the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """The all-gather over the ranks of `group`: [...] on each -> [R, ...] on all. None: this rank alone."""

    group: dist.ProcessGroup | None = None

    @property
    def num_ranks(self) -> int:
        """Number of ranks, R."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def __call__(self, x: Tensor) -> Tensor:
        """Gather, and wait for the result."""
        if self.num_ranks == 1:
            return x[None]
        gathered = x.new_empty(self.num_ranks, *x.shape)
        # Its one-tensor form has different names in different versions of torch.
        dist.all_gather(list(gathered), x.contiguous(), group=self.group)
        return gathered

    def start(self, parts: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to gather several tensors in one collective. Call the result to wait for [R, ...] of each."""
        if self.num_ranks == 1:
            return lambda: [x[None] for x in parts]
        flat = torch.cat([x.flatten() for x in parts])
        everyone = flat.new_empty(self.num_ranks, len(flat))
        work: Any = dist.all_gather(list(everyone), flat, group=self.group, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            pieces = everyone.split([x.numel() for x in parts], dim=1)
            return [piece.unflatten(1, x.shape) for piece, x in zip(pieces, parts, strict=True)]

        return wait


def merge(lse_R2SB: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the whole vocabulary, [2, S, B], and each shard's share of it, [R, S, B]."""
    peak_RSB, total_RSB = lse_R2SB.unbind(1)
    peak_SB = peak_RSB.amax(0)
    total_RSB = total_RSB * ((peak_RSB - peak_SB) / temperature).exp()
    total_SB = total_RSB.sum(0)
    return torch.stack([peak_SB, total_SB]), total_RSB / total_SB


def gather_sequence(loss_sB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join the slices of a sequence-parallel loss: [s, B] on each rank -> [S, B] on all.

    The gradient is this rank's slice, not summed over ranks. It is exact if every rank then computes the same total
    loss (Megatron's `gather_from_sequence_parallel_region(tensor_parallel_output_grad=False)`).
    Collectives: one all-gather in forward; none in backward.
    """
    return _GatherSequence.apply(loss_sB, group)  # pyright: ignore


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sB: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.start, ctx.length = dist.get_rank(group) * loss_sB.shape[0], loss_sB.shape[0]
        return Gather(group)(loss_sB).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None]:
        return grad_SB.narrow(0, ctx.start, ctx.length), None

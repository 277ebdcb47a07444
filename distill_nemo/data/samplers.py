"""Which rank gets which samples: the same global batches under every layout, from any point of the run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def batches(
    dataset: Dataset,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """An endless stream of this rank's micro batches.

    Sample i of the run is `dataset[i % len(dataset)]`, whatever the layout. The global batch that begins at sample c is
    [c, c + G); of it rank r takes [c + r*G/dp, c + (r+1)*G/dp), cut in micro batches in order.

    Args:
        dataset: of items with tokens, labels, loss_mask and position_ids, each [s].
        consumed_samples: where in the run to begin; samples of all ranks together.
        global_batch_size: G, samples of all ranks in one step.
        micro_batch_size: b, samples yielded at a time.
        data_parallel_rank: r.
        data_parallel_size: dp.
        num_workers: loader processes; 0 reads in this one.

    Yields:
        tokens, labels, position_ids (int64) and loss_mask (float32), each [b, s].
    """
    size: int = len(dataset)  # pyright: ignore[reportArgumentType]
    assert size > 0, "an empty dataset has no batches"
    assert global_batch_size % (data_parallel_size * micro_batch_size) == 0, "config.check lets no such batch through"
    order = _Order(size, consumed_samples, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size)
    pinned = torch.cuda.is_available()  # or a copy to the GPU waits for it
    loader = DataLoader(dataset, batch_sampler=order, num_workers=num_workers, collate_fn=_collate, pin_memory=pinned)
    return iter(loader)


class _Order:
    """The lists of indices of one rank's micro batches, without end."""

    def __init__(self, size: int, consumed: int, global_batch: int, micro_batch: int, rank: int, ranks: int):
        self.size, self.consumed, self.global_batch, self.micro_batch = size, consumed, global_batch, micro_batch
        self.share = global_batch // ranks
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed + self.offset
        while True:
            for start in range(first, first + self.share, self.micro_batch):
                yield [i % self.size for i in range(start, start + self.micro_batch)]
            first += self.global_batch


def _collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack what the model reads; a blend's items also carry the number of their dataset."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in FIELDS}
    batch["loss_mask"] = batch["loss_mask"].float()
    return batch

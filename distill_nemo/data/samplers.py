"""Assign samples to ranks, so that every layout has the same global batches from any point of a run."""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
TARGET = "target_"  # begins the names of a teacher's stored targets


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
    """Return an endless stream of this rank's micro batches.

    Sample i of the run is `dataset[i % len(dataset)]` under every layout. The global batch that begins at sample c is
    [c, c + G). Rank r takes its samples [c + r*G/dp, c + (r+1)*G/dp), cut into micro batches in order.

    Args:
        dataset: items with tokens, labels, loss_mask and position_ids, each [s].
        consumed_samples: samples of all ranks before the first batch.
        global_batch_size: G, samples of all ranks in one step.
        micro_batch_size: b, samples yielded at a time.
        data_parallel_rank: r.
        data_parallel_size: dp.
        num_workers: loader processes; 0 reads in this one.

    Yields:
        tokens, labels, position_ids (int64) and loss_mask (float32), each [b, s]; with `data.reset_at_documents` also
        document_starts, the position in the sample of the first token of each token's document; and what the dataset
        has of a teacher's targets, `target_*` [b, s, ...].

    Raises:
        ValueError, OSError: from the dataset, whichever process reads it.
        RuntimeError: if a loader process died.
    """
    size: int = len(dataset)  # pyright: ignore[reportArgumentType]
    assert size > 0, "an empty dataset has no batches"
    assert global_batch_size % (data_parallel_size * micro_batch_size) == 0, "checks.check refuses such a batch"
    order = _Order(size, consumed_samples, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size)
    pinned = torch.cuda.is_available()  # so that copies to the GPU are asynchronous
    samples, handler = _WithErrors(dataset), signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(samples, batch_sampler=order, num_workers=num_workers, collate_fn=_collate, pin_memory=pinned)
    loaded = iter(loader)
    if handler is not None and signal.getsignal(signal.SIGCHLD) != handler:
        # torch's handler raises at any point of the program when a worker dies, such as in a save. `next` notices too.
        signal.signal(signal.SIGCHLD, handler)
    return _checked(loaded)


def _checked(loaded: Iterator[dict[str, Tensor] | Exception]) -> Iterator[dict[str, Tensor]]:
    """Yield the same batches. Raise an error that stands in place of one, and explain the death of a worker."""
    while True:
        try:
            batch = next(loaded)
        except (RuntimeError, OSError, EOFError) as error:  # the last two if it died while it passed a batch on
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise RuntimeError(
                f"a data worker died, perhaps killed because memory ran out ({error}): lower data.num_workers; run the "
                "same command again to resume from the last checkpoint"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _WithErrors(Dataset):
    """Micro batches, or the error of reading one, which torch would otherwise wrap in a worker's traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]] | Exception:
        try:
            return [self.dataset[i] for i in indices]
        except (ValueError, OSError) as error:
            return error


class _Order:
    """Endless lists of indices of one rank's micro batches."""

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


def _collate(samples: list[dict[str, Tensor]] | Exception) -> dict[str, Tensor] | Exception:
    return samples if isinstance(samples, Exception) else collate(samples)


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the fields that a run reads. Items of a blend also carry the number of their dataset."""
    names = [name for name in samples[0] if name in (*FIELDS, "document_starts") or name.startswith(TARGET)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    batch["loss_mask"] = batch["loss_mask"].float()
    return batch

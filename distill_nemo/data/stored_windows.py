"""Windows of a teacher store, as samples. Legend: L sequence_length, M tokens of a window that count."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_nemo.data.samplers import TARGET
from distill_nemo.data.windows import Windows
from distill_nemo.teacher_store.codecs.codec import Arrays, Field
from distill_nemo.teacher_store.manifest import MANIFEST
from distill_nemo.teacher_store.reader import TeacherStore


class StoredWindows(Windows):
    """Windows of a teacher store.

    With targets, a sample also has what the teacher predicts for each token, `target_<name>` [L, ...]; at tokens that
    do not count, nothing (0, or -1 for an id). `target_has_targets` is 1 where there is something.
    """

    def __init__(self, path: str, with_targets: bool) -> None:
        self._store, self._with_targets = TeacherStore(path), with_targets

    @property
    def files(self) -> list[Path]:
        """The manifest, which has the hash of every shard."""
        return [self._store.path / MANIFEST]

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        window = self._store.window(number, self._with_targets)
        ids, mask = torch.from_numpy(window["tokens"].astype(np.int64)), window["loss_mask"]
        places = torch.arange(len(mask))
        sample = {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": torch.from_numpy(mask).float()}
        sample["position_ids"] = places
        if "document_starts" in window:
            starts = torch.from_numpy(window["document_starts"].astype(np.int64))
            sample |= {"position_ids": places - starts, "document_starts": starts}
        return sample | (_dense(window, self._store.manifest.fields) if self._with_targets else {})

    def check(self) -> None:
        """Leave it to the reader, which checks the shard of each window."""


def _dense(window: Arrays, fields: dict[str, Field]) -> dict[str, Tensor]:
    """Return the targets at the places of their tokens, [L, ...] each."""
    counts, dense = window["loss_mask"] != 0, _empty(fields, len(window["loss_mask"]))
    for name, array in dense.items():
        array[counts] = window[name] if name in window else 1  # has_targets
    return _tensors(dense)


def empty_targets(fields: dict[str, Field], length: int) -> dict[str, Tensor]:
    """Return the targets of a sample that has none, [L, ...] each."""
    return _tensors(_empty(fields, length))


def _empty(fields: dict[str, Field], length: int) -> Arrays:
    return {name: np.full((length, *field.shape), field.empty, field.dtype) for name, field in fields.items()}


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return arrays under their names in a batch."""
    return {TARGET + name: as_tensor(array) for name, array in arrays.items()}


def as_tensor(array: np.ndarray) -> Tensor:
    """Return an array that may be written to as a tensor; uint16 stands for the bits of bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

"""A set of conversations, packed by the package at several widths, and one after another for an oracle.

Every sample of 16 tokens, and every pack, holds one label more than inputs.
"""

import functools
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distill_nemo.config import DataConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.packing import best_fit
from distill_nemo.data.packs import Packs
from tests.distillation import VOCAB, Case
from tests.token_files import write_packs

LENGTHS = (14, 3, 16, 9, 2, 13, 5, 12, 7, 4, 11, 3, 10, 5, 6, 8)  # 128 tokens: 8 packs of 16 + 1, or 4 of 32 + 1
PACKS = {"one by one": 16, "packs of 16": 16, "packs of 32": 32}  # tokens of a sample


@functools.cache
def conversations() -> list[tuple[list[int], list[int]]]:
    """Return ids and mask of every conversation: some tokens count, and always the last, which ends the answer."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for length in LENGTHS:
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        counts = (torch.rand(length, generator=generator) > 0.5).int().tolist()
        found.append((ids, [*counts[:-1], 1]))
    return found


@functools.cache
def _written(pack: str, ends_count: bool = True) -> tuple[tempfile.TemporaryDirectory, str]:
    """Write the packs. Return what keeps them on the disk, and their prefix."""
    width, directory = PACKS[pack], tempfile.TemporaryDirectory()
    alone = [[i] for i in range(len(LENGTHS))]
    groups = alone if pack == "one by one" else best_fit(list(LENGTHS), width + 1)
    ids, counts = ([[conversations()[i][part] for i in group] for group in groups] for part in (0, 1))
    counts = [[[*mask[:-1], int(ends_count)] for mask in group] for group in counts]
    return directory, write_packs(Path(directory.name) / "packs", ids, width, counts)


@dataclass
class Packed(Case):
    """A case whose global batch are the conversations, in packs."""

    pack: str = "packs of 16"
    prefix: str = field(default="", init=False)  # written once, by the process that ranks get the case from

    def __post_init__(self) -> None:
        self.prefix = _written(self.pack)[1]

    @property
    def sequence(self) -> int:
        return PACKS[self.pack]

    @property
    def global_batch(self) -> int:
        return len(self.batch()["tokens"])

    @property
    def data(self) -> DataConfig:
        return DataConfig(train=[self.prefix], sequence_length=self.sequence)

    def batch(self) -> dict[str, torch.Tensor]:
        check_corpora(self.data)
        packs = Packs(self.prefix, self.sequence, None)
        samples = [packs[i] for i in range(len(packs))]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def unpacked(self) -> "Case":
        """Return the conversations one after another in a single row, whose documents the oracle runs by themselves."""
        return _InOneRow(self.student, self.teacher, self.distillation, documents=tuple(n - 1 for n in LENGTHS))


class _InOneRow(Case):
    def batch(self) -> dict[str, torch.Tensor]:
        rows = {
            "tokens": [ids[:-1] for ids, _ in conversations()],
            "labels": [ids[1:] for ids, _ in conversations()],
            "loss_mask": [counts[1:] for _, counts in conversations()],
        }
        batch = {name: torch.tensor([[*itertools.chain(*row)]]) for name, row in rows.items()}
        return batch | {"loss_mask": batch["loss_mask"].float()}

    def bounds(self, sample: int) -> list[tuple[int, int]]:
        return list(itertools.pairwise(itertools.accumulate(self.documents, initial=0)))


MISTAKES = [
    "attention that leaks over a boundary",
    "a mask shifted by one",
    "an end of turn that does not count",
]  # Rotary embeddings depend on differences of positions, so positions that are not reset change nothing here.


@dataclass
class Mistaken(Packed):
    """The same with a mistake in it, which must be seen."""

    mistake: str = ""

    def __post_init__(self) -> None:
        self.prefix = _written(self.pack, ends_count=self.mistake != MISTAKES[2])[1]

    def batch(self) -> dict[str, torch.Tensor]:
        batch = super().batch()
        if self.mistake == MISTAKES[0]:
            batch["document_starts"] = torch.zeros_like(batch["document_starts"])
        elif self.mistake == MISTAKES[1]:
            batch["loss_mask"] = batch["loss_mask"].roll(1, dims=1)
        return batch

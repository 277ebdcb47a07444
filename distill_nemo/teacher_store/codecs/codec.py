"""Codecs turn a teacher's targets into columns of a shard, and back.

Legend: M tokens of a window that count, K numbers kept of each at most, P pairs in a window.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from distill_nemo.config import DistillationConfig
from distill_nemo.teacher_store.packing import bytes_of

Arrays = dict[str, np.ndarray]
Axis = Literal["windows", "bounds", "tokens", "pairs"]
DTYPES = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1")}
DtypeName = Literal["float32", "bfloat16"]


class Column(NamedTuple):
    """One tensor of a shard.

    Args:
        dtype: as safetensors names it; numpy has no BF16, and sees its bits.
        shape: of a row.
        axis: a row is of a window, of a bound between windows, of a token that counts, or of a pair of a token.
    """

    dtype: str
    shape: tuple[int, ...]
    axis: Axis

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return DTYPES[self.dtype].itemsize * int(np.prod(self.shape, dtype=np.int64))


class Field(NamedTuple):
    """One array of a batch: its dtype, the shape of a token's part, and its value where a token has no targets."""

    dtype: str  # of numpy
    shape: tuple[int, ...]
    empty: int = 0


class Codec(ABC):
    """One way to keep a teacher's distribution.

    Args:
        num: draws (`sampled`), ids (`top_k`) or channels (`hidden`) of a token.
        vocab_size: of the teacher, without padding.
        dtype: of the teacher's run.
    """

    name: ClassVar[str]

    def __init__(self, num: int, vocab_size: int, dtype: DtypeName) -> None:
        self.num, self.vocab_size, self.dtype = num, vocab_size, dtype

    @property
    def id_bytes(self) -> int:
        """Bytes of an id."""
        return bytes_of(self.vocab_size - 1)

    @property
    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """Columns of a shard, with axis "tokens" or "pairs"."""

    @property
    @abstractmethod
    def fields(self) -> dict[str, Field]:
        """Arrays of a window, [M, ...], and of a batch."""

    @property
    @abstractmethod
    def usual_bytes(self) -> float:
        """Bytes of a token that counts on usual text, for a plan."""

    @abstractmethod
    def pack(self, window: Arrays) -> Arrays:
        """Return the columns of a window's targets.

        Raises:
            ValueError: for an id that the vocabulary lacks, or another number that cannot be.
        """

    @abstractmethod
    def unpack(self, columns: Arrays) -> Arrays:
        """Return the targets; the inverse of `pack`.

        Raises:
            ValueError: for columns that `pack` cannot have made.
        """

    @abstractmethod
    def unfit(self, losses: DistillationConfig, temperature: float) -> dict[str, object]:
        """Return the fields of `distillation` that must change, with the values that would fit.

        Args:
            losses: of the run.
            temperature: of the store.
        """


def differing(losses: DistillationConfig, **needed: object) -> dict[str, object]:
    """Return those of the needed fields that `losses` has not."""
    return {name: value for name, value in needed.items() if getattr(losses, name) != value}


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValueError: naming the first.
    """
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"holds the id {wrong.flat[0]}, but the teacher has the ids 0 to {vocab_size - 1}")

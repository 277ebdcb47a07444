"""Draws from the teacher's distribution at the store's temperature: (id, count) pairs, as many as a token has.

An unbiased estimate of the distribution: counts / N, with counts that are exact integers.
"""

import math

import numpy as np

from distill_nemo.config import DistillationConfig
from distill_nemo.teacher_store.codecs.codec import Arrays, Codec, Column, Field, check_ids, differing
from distill_nemo.teacher_store.packing import bytes_of, pack_numbers, unpack_numbers


class Sampled(Codec):
    """`ids` int32 [M, N], -1 where a token has fewer, and `counts` int32 [M, N]; a token's counts sum to N."""

    name = "sampled"

    @property
    def width(self) -> int:
        """Ids of a token at most."""
        return min(self.num, self.vocab_size)

    @property
    def columns(self) -> dict[str, Column]:
        """Pairs in ceil((bits of an id + bits of N) / 8) bytes, and how many a token has."""
        pair = bytes_of(((self.vocab_size - 1) << self._count_bits) | self.num)
        return {
            "num_ids": Column("U8", (bytes_of(self.width),), "tokens"),
            "pairs": Column("U8", (pair,), "pairs"),
        }

    @property
    def fields(self) -> dict[str, Field]:
        """Ids and counts."""
        return {"ids": Field("int32", (self.width,), -1), "counts": Field("int32", (self.width,))}

    @property
    def usual_bytes(self) -> float:
        """2.5 sqrt(N) different ids, as a teacher of 2 to 3 nats has."""
        num_ids = min(2.5 * math.sqrt(self.num), self.width)
        return self.columns["num_ids"].row_bytes + num_ids * self.columns["pairs"].row_bytes

    @property
    def _count_bits(self) -> int:
        return self.num.bit_length()

    def pack(self, window: Arrays) -> Arrays:
        """Keep the pairs that are there."""
        drawn = window["ids"] >= 0
        ids, counts = window["ids"][drawn].astype(np.int64), window["counts"][drawn].astype(np.int64)
        check_ids(ids, self.vocab_size)
        if ids.size and (counts.min() < 1 or counts.max() > self.num):
            raise ValueError(f"holds a count that is not 1 to {self.num}")
        if (window["counts"].sum(1) != self.num).any():
            raise ValueError(f"holds counts of a token that do not sum to {self.num}")
        num_ids = drawn.sum(1)
        columns = self.columns
        return {
            "num_ids": pack_numbers(num_ids, *columns["num_ids"].shape),
            "pairs": pack_numbers(ids << self._count_bits | counts, *columns["pairs"].shape),
        }

    def unpack(self, columns: Arrays) -> Arrays:
        """Return the pairs of each token side by side."""
        num_ids, pairs = unpack_numbers(columns["num_ids"]), unpack_numbers(columns["pairs"])
        if num_ids.sum() != len(pairs) or (num_ids.size and num_ids.max() > self.width):
            raise ValueError("has tokens with another number of ids than it says")
        ids, counts = pairs >> self._count_bits, pairs & ((1 << self._count_bits) - 1)
        check_ids(ids, self.vocab_size)
        there = np.arange(self.width) < num_ids[:, None]
        targets = {"ids": np.full(there.shape, -1, np.int32), "counts": np.zeros(there.shape, np.int32)}
        targets["ids"][there], targets["counts"][there] = ids, counts
        return targets

    def unfit(self, losses: DistillationConfig, temperature: float) -> dict[str, object]:
        """Forward KL alone is linear in the teacher's probabilities, at the temperature of the draws."""
        return differing(losses, divergence="forward_kl", top_k=None, temperature=temperature)

"""The teacher's most likely ids with their log-probabilities, and the log of all other ids' probability.

A log-probability is a multiple of 2**-11 in two bytes, so a probability is at most 2**-12 (0.025 %) of itself too large
or small; the least is e**-32. Of log-probabilities below -1, fp16 would keep 2 to 32 times less.
"""

import numpy as np

from distill_nemo.config import DistillationConfig
from distill_nemo.teacher_store.codecs.codec import Arrays, Codec, Column, Field, check_ids, differing
from distill_nemo.teacher_store.packing import pack_numbers, unpack_numbers

STEPS = 2**11  # of a nat
LOGPROB_BYTES = 2
MOST_STEPS = 256**LOGPROB_BYTES - 1
LEAST = -MOST_STEPS / STEPS  # log-probability


class TopK(Codec):
    """`ids` int32 [M, k], `logprobs` float32 [M, k] and `tail` float32 [M], over the whole vocabulary."""

    name = "top_k"

    @property
    def columns(self) -> dict[str, Column]:
        """Ids in as many bytes as the vocabulary needs, log-probabilities in steps, and the tail as it is."""
        return {
            "top_ids": Column("U8", (self.num, self.id_bytes), "tokens"),
            "top_logprobs": Column("U8", (self.num, LOGPROB_BYTES), "tokens"),
            "tail": Column("F32", (), "tokens"),
        }

    @property
    def fields(self) -> dict[str, Field]:
        """Ids, log-probabilities and tail."""
        return {
            "ids": Field("int32", (self.num,), -1),
            "logprobs": Field("float32", (self.num,)),
            "tail": Field("float32", ()),
        }

    @property
    def usual_bytes(self) -> float:
        """The same on every text."""
        return sum(column.row_bytes for column in self.columns.values())

    def pack(self, window: Arrays) -> Arrays:
        """Pack ids and log-probabilities."""
        check_ids(window["ids"], self.vocab_size)
        steps = np.rint(window["logprobs"] * -STEPS)
        if not (steps >= 0).all():
            raise ValueError("holds a log-probability that is above 0, or not a number")
        _check_tail(window["tail"])
        return {
            "top_ids": pack_numbers(window["ids"].astype(np.int64), self.id_bytes),
            "top_logprobs": pack_numbers(steps.clip(max=MOST_STEPS).astype(np.int64), LOGPROB_BYTES),
            "tail": window["tail"],
        }

    def unpack(self, columns: Arrays) -> Arrays:
        """Return ids as int32, and log-probabilities as float32, which holds all steps."""
        ids = unpack_numbers(columns["top_ids"]).astype(np.int32, copy=False)
        check_ids(ids, self.vocab_size)
        _check_tail(columns["tail"])
        logprobs = unpack_numbers(columns["top_logprobs"]) / np.float32(-STEPS)
        return {"ids": ids, "logprobs": logprobs.astype(np.float32, copy=False), "tail": columns["tail"]}

    def unfit(self, losses: DistillationConfig, temperature: float) -> dict[str, object]:
        """Forward KL with as many ids, at the store's temperature."""
        return differing(losses, divergence="forward_kl", top_k=self.num, temperature=temperature)


def _check_tail(tail: np.ndarray) -> None:
    """Refuse the log of a probability above 1, but for rounding; it is -inf where nothing is left."""
    if not (tail <= 1e-3).all():
        raise ValueError("holds a tail that is above 0, or not a number")

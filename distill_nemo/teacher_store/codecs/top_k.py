"""The teacher's most likely ids with their log-probabilities, and the log of all other ids' probability."""

import numpy as np

from distill_nemo.config import DistillationConfig
from distill_nemo.teacher_store.codecs.codec import Arrays, Codec, Column, Field, check_ids, differing
from distill_nemo.teacher_store.packing import pack_numbers, unpack_numbers


class TopK(Codec):
    """`ids` int32 [M, k], `logprobs` float32 [M, k] and `tail` float32 [M], over the whole vocabulary."""

    name = "top_k"

    @property
    def columns(self) -> dict[str, Column]:
        """Ids in as many bytes as the vocabulary needs; log-probabilities as they are."""
        return {
            "top_ids": Column("U8", (self.num, self.id_bytes), "tokens"),
            "logprobs": Column("F32", (self.num,), "tokens"),
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
        """Check and pack the ids."""
        check_ids(window["ids"], self.vocab_size)
        packed = pack_numbers(window["ids"].astype(np.int64), self.id_bytes)
        return {"top_ids": packed, "logprobs": window["logprobs"], "tail": window["tail"]}

    def unpack(self, columns: Arrays) -> Arrays:
        """Return ids as int32."""
        ids = unpack_numbers(columns["top_ids"]).astype(np.int32, copy=False)
        check_ids(ids, self.vocab_size)
        return {"ids": ids, "logprobs": columns["logprobs"], "tail": columns["tail"]}

    def unfit(self, losses: DistillationConfig, temperature: float) -> dict[str, object]:
        """Forward KL with as many ids, at the store's temperature."""
        return differing(losses, divergence="forward_kl", top_k=self.num, temperature=temperature)

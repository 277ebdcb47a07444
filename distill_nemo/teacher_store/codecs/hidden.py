"""The teacher's last hidden states, from which a run computes its logits: every divergence and temperature, exactly."""

from distill_nemo.config import DistillationConfig
from distill_nemo.teacher_store.codecs.codec import Arrays, Codec, Column, Field


class Hidden(Codec):
    """`hidden` [M, H], float32; of a bfloat16 teacher its bits as uint16."""

    name = "hidden"

    @property
    def columns(self) -> dict[str, Column]:
        """The states as they are."""
        return {"hidden": Column({"float32": "F32", "bfloat16": "BF16"}[self.dtype], (self.num,), "tokens")}

    @property
    def fields(self) -> dict[str, Field]:
        """The states."""
        return {"hidden": Field({"float32": "float32", "bfloat16": "uint16"}[self.dtype], (self.num,))}

    @property
    def usual_bytes(self) -> float:
        """The same on every text."""
        return self.columns["hidden"].row_bytes

    def pack(self, window: Arrays) -> Arrays:
        """Return the states."""
        return {"hidden": window["hidden"]}

    def unpack(self, columns: Arrays) -> Arrays:
        """Return the states."""
        return {"hidden": columns["hidden"]}

    def unfit(self, losses: DistillationConfig, temperature: float) -> dict[str, object]:
        """Every loss of logits fits."""
        return {}

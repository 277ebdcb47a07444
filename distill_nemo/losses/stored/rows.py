"""Stored targets of some tokens, as the fused loop of `losses/fused_linear` takes them. Legend: `loss.py`."""

from dataclasses import dataclass, replace

from torch import Tensor

from distill_nemo.losses.cross_entropy import columns_of


@dataclass(frozen=True)
class StoredRows:
    """Fields of a store, [N] or [N, K] each.

    Args:
        fields: by name; `ids` of -1 are none.
        vocab_start: global index of this rank's first column.
        width: number of its columns.
    """

    fields: dict[str, Tensor]
    vocab_start: int
    width: int

    @property
    def num_buffers(self) -> int:
        """Return 0: stored targets have no logits."""
        return 0

    def frozen(self, width: int) -> "StoredRows":
        """Return it; it has no gradients."""
        assert width == self.width, (width, self.width)
        return self

    def take(self, index_M: Tensor) -> "StoredRows":
        """Return it for some tokens only."""
        return replace(self, fields={name: x[index_M] for name, x in self.fields.items()})

    def part(self, rows: slice, num_true: int, *buffer_nv: Tensor) -> "StoredRows":
        """Return it for successive tokens."""
        return replace(self, fields={name: x[rows] for name, x in self.fields.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return True for the ids that are this rank's, and their columns here (0 for the others): [N, K] each."""
        inside_NK, column_NK = columns_of(self["ids"], self.vocab_start, self.width)
        return inside_NK & (self["ids"] >= 0), column_NK.long()

"""The teacher's output layer, beside the shards of a store of hidden states.

Legend: V the vocabulary, H channels of a hidden state.
"""

from pathlib import Path

import numpy as np

from distill_nemo.teacher_store.codecs.codec import DTYPES, Column
from distill_nemo.teacher_store.manifest import OUTPUT_LAYER, Manifest
from distill_nemo.teacher_store.shards import ColumnFile, Layout, layout_of
from distill_nemo.teacher_store.writer import one_job_at_a_time, write_columns


def write_output_layer(store: Path, manifest: Manifest, weight_VH: np.ndarray, bias_V: np.ndarray | None) -> None:
    """Write the layer into a store that was created, unless it is there. One rank of a job calls it, several jobs may.

    Args:
        store: directory.
        manifest: of the store.
        weight_VH: float32, or the bits of bfloat16 as uint16, as the hidden states are.
        bias_V: the same, if `output_bias`.

    Raises:
        OSError: if it cannot be written.
    """
    assert (bias_V is not None) == manifest.output_bias, "the manifest says if there is one"
    columns, layout = _columns(manifest)
    blocks = {"weight": weight_VH, **({} if bias_V is None else {"bias": bias_V})}
    for name, column in columns.items():
        wanted = DTYPES[column.dtype], (manifest.vocab_size, *column.shape)
        assert (blocks[name].dtype, blocks[name].shape) == wanted, (name, blocks[name].dtype, wanted)
    with one_job_at_a_time(store / OUTPUT_LAYER):
        if not (store / OUTPUT_LAYER).exists():
            write_columns(store / OUTPUT_LAYER, layout, (np.ascontiguousarray(blocks[name]) for name in columns))


class OutputLayer:
    """The layer of a store, of which a tensor-parallel rank reads its rows.

    Raises:
        ValueError: if the file is missing, or is not as the manifest says.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._file = ColumnFile(store / OUTPUT_LAYER, *_columns(manifest))

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Return rows of "weight", [count, H], or of "bias", [count]; the bits of bfloat16 as uint16."""
        return self._file.rows(name, first, count)


def _columns(manifest: Manifest) -> tuple[dict[str, Column], Layout]:
    dtype = manifest.coding.columns["hidden"].dtype
    columns = {"weight": Column(dtype, (manifest.num,), "tokens")}
    columns |= {"bias": Column(dtype, (), "tokens")} if manifest.output_bias else {}
    return columns, layout_of(columns, {"tokens": manifest.vocab_size})

"""Tensors of the result, each cut out of the source's when it is needed. The whole model is never in memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import PieceReader, as_parameter, read_header
from distill_nemo.models.checkpoints.stacked_experts import in_stack
from distill_nemo.models.checkpoints.tensor_files import LABELS, Entries, Entry, TensorFiles
from distill_nemo.models.checkpoints.write_safetensors import (
    MAX_FILE_BYTES,
    METADATA,
    file_name,
    plan_files,
    prepare_directory,
)
from distill_nemo.models.families.pieces import OUTSIDE, Piece, Place, Size, SizedRule
from distill_nemo.models.families.tensors import hf_shapes, parameters
from distill_nemo.pruning.choice import Kept
from distill_nemo.runtime.everyone import Everyone
from distill_nemo.runtime.files import fsync

# Axes whose rows come head by head, each with equally many.
BY_HEAD = ("heads", "num_heads", "gated_heads", "latent_queries", "latent_values", "latent_keys_values")
BY_MAMBA_HEAD = ("mamba_heads", "mamba_channels")
BY_CHANNEL = {"expert_ffn": 1, "gate_and_up": 2}  # axes of an expert, with the rows of each of its channels
OPEN_TENSORS = 4  # queries, keys and values are read in turns


class Cut(NamedTuple):
    """A tensor of the result: the source's tensor, its place there, and the sizes along each dimension."""

    source: str
    place: Place
    dimensions: tuple[tuple[Size, ...], ...]


class CutTensors:
    """Context manager that returns tensors of the result, by their names there.

    Args:
        model: the source, with its headers.
        cut: the result.
        kept: parts of `model` that `cut` consists of.
    """

    def __init__(self, model: Architecture, cut: Architecture, kept: Kept) -> None:
        assert model.source is not None
        self._stored, self._kept, self._shapes = model.source.tensors, kept, hf_shapes(cut)
        self._model, self._reader = model, PieceReader(self._stored)
        self._cuts = {name: each for name, each in _cuts(model, cut, kept) if name in self._shapes}
        self._open: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._reader.__exit__(kind, error, trace)

    @property
    def entries(self) -> Entries:
        """Dtype, that of the source's tensor, and shape of each. Quantised ones are bf16."""
        return {name: Entry(self._dtype(self._cuts[name].source), shape) for name, shape in self._shapes.items()}

    def read(self, piece: Piece) -> Tensor:
        """Return a piece of the result, as `PieceReader` does for a directory."""
        if piece.name not in self._open:
            while len(self._open) >= OPEN_TENSORS:
                del self._open[next(iter(self._open))]
            self._open[piece.name] = self.tensor(piece.name)
        return as_parameter(self._open[piece.name][piece.index], piece)

    def tensor(self, name: str) -> Tensor:
        """Cut a whole tensor out of the source's. A quantised one has the values that are written, those of bf16."""
        whole = self._tensor(name)
        return whole.bfloat16() if self._dtype(self._cuts[name].source) == LABELS[torch.bfloat16] else whole

    def _tensor(self, name: str) -> Tensor:
        source, place, dimensions = self._cuts[name]
        whole = self._reader.read(Piece(source, tuple(slice(0, sum(s(place) for s in sizes)) for sizes in dimensions)))
        stacked = _names(dimensions[0]) == ["experts"] and any(BY_CHANNEL.get(s.__name__) for s in sum(dimensions, ()))
        if not stacked:
            return self._cut(whole, dimensions, place).contiguous()
        experts = self._kept.experts[place.number]
        return torch.stack([self._cut(whole[e], dimensions[1:], place._replace(expert=e)) for e in experts])

    def _cut(self, tensor: Tensor, dimensions: tuple[tuple[Size, ...], ...], place: Place) -> Tensor:
        for dimension, sizes in enumerate(dimensions):
            parts = [self._indices(size, place) for size in sizes]
            if any(part is not None for part in parts):
                tensor = tensor.index_select(dimension, _one_after_another(parts, [size(place) for size in sizes]))
        return tensor

    def _indices(self, size: Size, place: Place) -> Tensor | None:
        """Return the rows of an axis that stay; None for all."""
        axis, layer, kept = size.__name__, place.number, self._kept
        if axis == "hidden":
            return _rows(kept.hidden, 1)
        if axis in BY_HEAD:
            return _rows(kept.heads[layer], size(place) // self._model.num_attention_heads)
        if axis in BY_MAMBA_HEAD:
            assert self._model.mamba is not None
            return _rows(kept.mamba[layer], size(place) // self._model.mamba.num_heads)
        if axis == "groups":
            return _rows(kept.groups[layer], size(place) // self._model.num_query_groups)
        if axis == "ffn":
            return _rows(kept.ffn[layer], 1)
        if axis == "shared_ffn":
            return _rows(kept.shared_ffn[layer], 1)
        if axis == "experts":
            return _rows(kept.experts[layer], 1)
        if axis in BY_CHANNEL:
            return _rows(kept.expert_ffn[layer][place.expert], BY_CHANNEL[axis])
        return None

    def _dtype(self, source: str) -> str:
        name = in_stack(Piece(source, (slice(0, 1), slice(0, 1))), self._stored).name  # of experts
        stored = self._stored[name]
        return LABELS[torch.bfloat16] if stored.scales is not None else stored.dtype


def _cuts(model: Architecture, cut: Architecture, kept: Kept) -> Iterator[tuple[str, Cut]]:
    """Yield name and origin of every tensor of the result."""
    for _, rule, place in parameters(cut):
        assert isinstance(rule, SizedRule), "a rule without axes"
        origin = place._replace(model=model)
        if place.layer is not OUTSIDE:
            number = kept.layers[place.number]
            expert = kept.experts[number][place.expert] if number in kept.experts else 0
            origin = Place(model, model.layers[number], number, expert)
        for template, dimensions in rule.axes.items():
            name = template.format(i=place.number, e=place.expert)
            yield name, Cut(template.format(i=origin.number, e=origin.expert), origin, dimensions)


def _names(sizes: tuple[Size, ...]) -> list[str]:
    return [size.__name__ for size in sizes]


def _rows(numbers: list[int], each: int) -> Tensor:
    """Return the rows of some parts that have `each` consecutive rows."""
    return (torch.tensor(numbers)[:, None] * each + torch.arange(each)).flatten()


def _one_after_another(parts: list[Tensor | None], sizes: list[int]) -> Tensor:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    whole = [torch.arange(size) if part is None else part for part, size in zip(parts, sizes, strict=True)]
    return torch.cat([part + start for part, start in zip(whole, starts, strict=True)])


def write_cut(cut: CutTensors, directory: Path, everyone: Everyone, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write `model.safetensors`, or numbered files and their index. Collective; all ranks share the file system.

    Each rank writes some of the files. Files of an interrupted call that are whole are kept: one gets its name when
    all of it is on the disk.

    Raises:
        AgreedError: on every rank, if a file cannot be read or written.
    """
    entries = cut.entries
    names = plan_files({name: entry.nbytes for name, entry in entries.items()}, max_file_bytes)
    files = {file_name(i, len(names)): {name: entries[name] for name in own} for i, own in enumerate(names)}
    failure: OSError | SafetensorError | None = None
    try:
        prepare_directory(files, directory)
    except OSError as error:
        failure = error
    everyone.raise_errors(failure)
    try:
        for file in list(files)[dist.get_rank() :: dist.get_world_size()]:
            if not _is_whole(directory / file, files[file]):
                _write_file(cut, directory, file, files[file])
    except (OSError, SafetensorError) as error:
        failure = error
    everyone.raise_errors(failure)


def _is_whole(path: Path, entries: Entries) -> bool:
    try:
        return {name: Entry(tensor.dtype, tensor.shape) for name, tensor in read_header(path).items()} == entries
    except ValueError:  # missing
        return False


def _write_file(cut: CutTensors, directory: Path, file: str, entries: Entries) -> None:
    unfinished = f"{file}.partial"
    with TensorFiles(directory, {unfinished: entries}, METADATA) as writing:
        writing.create(unfinished)
        for name, entry in entries.items():
            tensor = cut.tensor(name)
            assert tuple(tensor.shape) == entry.shape, (name, tensor.shape, entry)
            writing.write(name, tensor)
    fsync(directory / unfinished)
    os.replace(directory / unfinished, directory / file)
    print(f"wrote {file}, {sum(entry.nbytes for entry in entries.values()) / 1e9:.2f} GB", flush=True)

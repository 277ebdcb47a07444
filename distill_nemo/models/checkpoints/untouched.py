"""Copy tensors into an export that its source holds besides the student's: layers that predict further tokens, say."""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.fields import first_few
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import FLOATS, OLD_BUFFER, PieceReader, stored_tensors
from distill_nemo.models.checkpoints.stacked_experts import unstacked
from distill_nemo.models.checkpoints.tensor_files import Entries, Entry, TensorFiles
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import hf_shapes
from distill_nemo.models.sources import StoredTensor

Untouched = dict[str, StoredTensor]


def untouched_tensors(path: Path, model: Architecture) -> Untouched:
    """Return the tensors in a directory that no parameter of a model holds.

    Args:
        path: the Hugging Face directory that the model came from.
        model: the architecture.

    Raises:
        ValueError: if there are none, one is quantised, or the directory names the model's own tensors differently, as
            one of images and text does.
    """
    stored, wanted = stored_tensors(path), hf_shapes(model)
    if not wanted.keys() <= unstacked({name: tensor.shape for name, tensor in stored.items()}, wanted).keys():
        raise ValueError(f"copy_untouched: {path} holds the student inside another model, and an export is the student")
    of_model = {*wanted, "lm_head.weight"}
    found = {
        name: tensor
        for name, tensor in stored.items()
        if of_model.isdisjoint(unstacked({name: tensor.shape}, wanted)) and not name.endswith(OLD_BUFFER)
    }
    quantised = [f"{name:.120} is {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in FLOATS]
    if quantised:
        raise ValueError(
            f"copy_untouched: {path} is quantised, and an export is not: {', '.join(first_few(quantised))}"
        )
    if not found:
        raise ValueError(f"copy_untouched: {path} holds no tensors besides the student's")
    return found


class Copies:
    """This rank's share of the tensors to copy."""

    def __init__(self, untouched: Untouched) -> None:
        names = sorted(untouched)[dist.get_rank() :: dist.get_world_size()]
        self.stored = {name: untouched[name] for name in names}

    @property
    def entries(self) -> Entries:
        """Dtype and shape of each."""
        return {name: Entry(tensor.dtype, tensor.shape) for name, tensor in self.stored.items()}

    def write(self, writing: TensorFiles) -> None:
        """Copy them, one after another."""
        for name, tensor in self._read():
            if name in writing:
                writing.write(name, tensor)

    def differing(self, directory: Mapping[str, StoredTensor], names: Container[str]) -> Iterator[str]:
        """Yield those of `names` that `directory` does not hold bit for bit."""
        with PieceReader(directory) as reader:
            for name, tensor in self._read():
                if name in names and not torch.equal(_bytes(reader.read(_whole(name, tensor))), _bytes(tensor)):
                    yield name

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        with PieceReader(self.stored) as reader:
            for name, tensor in self.stored.items():
                yield name, reader.read(_whole(name, tensor))


def _whole(name: str, tensor: StoredTensor | Tensor) -> Piece:
    return Piece(name, tuple(slice(0, size) for size in tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

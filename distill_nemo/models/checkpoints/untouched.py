"""Copy tensors into an export that its source holds besides the student's.

They are layers that predict further tokens, or the rest of a model of images and text whose text model the student is.
"""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.fields import first_few
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import FLOATS, OLD_BUFFER, PieceReader, own_name, stored_tensors
from distill_nemo.models.checkpoints.local_parameters import bytes_of
from distill_nemo.models.checkpoints.quantized import merge_scales
from distill_nemo.models.checkpoints.stacked_experts import unstacked
from distill_nemo.models.checkpoints.tensor_files import DTYPES, Entries, Entry, TensorFiles
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.family import Wrapper
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import hf_shapes
from distill_nemo.models.sources import StoredTensor
from distill_nemo.models.stored_quantization import read_stored_quantization, with_modelopt
from distill_nemo.runtime.files import read_object

PLAIN = "BF16"  # dtype in which quantised tensors are copied


class Untouched(NamedTuple):
    """Tensors to copy, and the model of images and text that they make up with the student, if there is one."""

    tensors: dict[str, StoredTensor]
    wrapper: Wrapper | None = None

    def name_beside(self, name: str) -> str:
        """Return the name that a tensor of the student has in the same export."""
        if self.wrapper is None or not name.startswith("model."):
            return name
        return self.wrapper.prefix + name.removeprefix("model.")


def untouched_tensors(path: Path | None, model: Architecture) -> Untouched:
    """Return the tensors in a directory that no parameter of a model holds.

    Args:
        path: the Hugging Face directory that the model came from.
        model: the architecture.

    Raises:
        ValueError: if there is no such directory, it holds none, one has a dtype that is not copied, or the model's own
            are named differently.
    """
    if path is None:
        raise ValueError("copy_untouched: the student came from no Hugging Face directory that still exists")
    stored, wanted = stored_tensors(path), hf_shapes(model)
    config = with_modelopt(read_object(path / "config.json"), path)
    quantization = read_stored_quantization(config, str(path / "config.json"))
    if quantization is not None:
        stored = merge_scales(path, stored, quantization)
    shapes = {name: unstacked({own_name(name, FAMILIES[model.family]): x.shape}, wanted) for name, x in stored.items()}
    if not wanted.keys() <= {own for of_one in shapes.values() for own in of_one}:
        raise ValueError(f"copy_untouched: {path} holds the student inside another model, and an export is the student")
    of_model = {*wanted, "lm_head.weight"}
    found = {
        name: tensor
        for name, tensor in stored.items()
        if of_model.isdisjoint(shapes[name]) and not name.endswith(OLD_BUFFER)
    }
    unreadable = [f"{x:.120} is {y.dtype}" for x, y in found.items() if y.dtype not in FLOATS and y.scales is None]
    if unreadable:
        raise ValueError(f"copy_untouched: {path}: {', '.join(first_few(unreadable))}, which is not copied")
    if not found:
        raise ValueError(f"copy_untouched: {path} holds no tensors besides the student's")
    wrapper = FAMILIES[model.family].wrapper
    return Untouched(found, wrapper if wrapper and wrapper.model_type == config.get("model_type") else None)


class Copies:
    """This rank's share of the tensors to copy."""

    def __init__(self, untouched: Untouched) -> None:
        names = sorted(untouched.tensors)[dist.get_rank() :: dist.get_world_size()]
        self.stored = {name: untouched.tensors[name] for name in names}

    @property
    def entries(self) -> Entries:
        """Dtype and shape of each copy."""
        return {name: Entry(PLAIN if x.scales else x.dtype, x.shape) for name, x in self.stored.items()}

    def write(self, writing: TensorFiles) -> None:
        """Copy them, one after another."""
        for name, tensor in self._read():
            if name in writing:
                writing.write(name, tensor)

    def differing(self, directory: Mapping[str, StoredTensor], names: Container[str]) -> Iterator[str]:
        """Yield those of `names` that `directory` does not hold bit for bit."""
        with PieceReader(directory) as reader:
            for name, tensor in self._read():
                if name in names and not torch.equal(bytes_of(reader.read(_whole(name, tensor))), bytes_of(tensor)):
                    yield name

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        with PieceReader(self.stored) as reader:
            for name, tensor in self.stored.items():
                values = reader.read(_whole(name, tensor))
                yield name, values.to(DTYPES[PLAIN]) if tensor.scales else values


def _whole(name: str, tensor: StoredTensor | Tensor) -> Piece:
    return Piece(name, tuple(slice(0, size) for size in tensor.shape))

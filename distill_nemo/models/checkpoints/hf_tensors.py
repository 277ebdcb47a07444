"""Read and check the safetensors of a Hugging Face directory.

Headers and `config.json` both come with the checkpoint, so neither is trusted: they must agree.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from distill_nemo.fields import first_few
from distill_nemo.hub import SAFETENSORS, recorded_name
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.quantized import merge_scales, read_quantized
from distill_nemo.models.checkpoints.stacked_experts import in_stack, unstacked
from distill_nemo.models.config_fields import shown
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import hf_shapes
from distill_nemo.models.sources import StoredTensor
from distill_nemo.models.stored_quantization import read_stored_quantization
from distill_nemo.runtime.files import read_object

VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
ROWS_AT_ONCE = 4096  # rows of an embedding to compare at a time
SINGLE_FILE, INDEX = SAFETENSORS
FLOATS = ("BF16", "F16", "F32", "F64")
OLD_BUFFER = "rotary_emb.inv_freq"  # stored with old Llamas; computed today
LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d{1,9})\.")


def has_weights(path: Path) -> bool:
    """Return True if the directory holds safetensors; a plan needs only config.json."""
    return any(path.glob("*.safetensors"))


def check_hf_tensors(path: Path, model: Architecture) -> dict[str, StoredTensor]:
    """Compare the safetensors headers in `path` with the tensors that an architecture needs; return the headers.

    Args:
        path: the directory.
        model: with the vocabulary that `path` states.

    Raises:
        ValueError: if tensors are missing, extra, of another shape, or neither plain floats nor quantised as the
            source's config.json says, or a file is corrupt. The message names them.
    """
    stored = _without_further_layers(stored_tensors(path), model)
    quantization = read_stored_quantization(model.source.config, str(path / "config.json")) if model.source else None
    if quantization is not None:
        stored = merge_scales(path, stored, quantization)
    for name, usual in FAMILIES[model.family].other_names.items():
        if name in stored:
            stored[usual] = stored.pop(name)._replace(name=name)
    stored = of_text_model(stored, FAMILIES[model.family])
    _check_dtypes(path, stored)
    layers = 1 + max((int(match[1]) for name in stored if (match := LAYER.match(name))), default=-1)
    if layers != model.num_layers:
        raise ValueError(
            f"{path} does not fit its architecture: config.json says num_hidden_layers = {model.num_layers}, the "
            f"safetensors hold {layers} layers"
        )
    wanted = hf_shapes(model)
    ignored = {"lm_head.weight"} if model.tie_word_embeddings else set()
    found = {name: tensor.shape for name, tensor in stored.items() if not name.endswith(OLD_BUFFER)}
    found = unstacked(found, wanted)
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"extra: {name:.120} {found[name]}" for name in found if name not in wanted and name not in ignored]
    problems += [
        f"{name} has shape {found[name]}, needs {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit its architecture:\n  " + "\n  ".join(first_few(problems)))
    return stored


def _without_further_layers(stored: dict[str, StoredTensor], model: Architecture) -> dict[str, StoredTensor]:
    """Leave out the layers after the last one that predict further tokens, as many as config.json states.

    Each has a projection of a hidden state beside an embedding (`eh_proj`). Another layer there is one too many.
    """
    count = model.source.config.get("num_nextn_predict_layers") if model.source else None
    stated = range(model.num_layers, model.num_layers + count) if isinstance(count, int) else ()
    with_projection = (match for name in stored if name.endswith(".eh_proj.weight") and (match := LAYER.match(name)))
    further = {number for match in with_projection if (number := int(match[1])) in stated}
    return {name: x for name, x in stored.items() if not ((match := LAYER.match(name)) and int(match[1]) in further)}


def own_name(name: str, family: Family) -> str:
    """Return a tensor's name without the prefix of a model of images and text."""
    if family.wrapper is None or not name.startswith(family.wrapper.prefix):
        return name
    return "model." + name.removeprefix(family.wrapper.prefix)


def of_text_model(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """Leave out tensors that transformers ignores, and the prefix of a model of images and text."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name.startswith(family.ignored_tensors):
            continue
        own = own_name(name, family)
        if own in found:
            raise ValueError(f"{name:.120} is stored twice: {own:.120} stands for it, too")
        found[own] = tensor if own == name else tensor._replace(name=name)
    return found


def check_tied_weights(stored: Mapping[str, StoredTensor], model: Architecture) -> None:
    """Refuse tied embeddings stored beside a different output layer. Reads both, some rows at a time.

    Raises:
        ValueError: if the two differ.
    """
    if not model.tie_word_embeddings or "lm_head.weight" not in stored:
        return
    if _equal(*VOCAB_TENSORS, stored):
        return
    raise ValueError(
        f"{stored['lm_head.weight'].file.parent}: config.json says tie_word_embeddings, but lm_head.weight and "
        "model.embed_tokens.weight differ: transformers would use both; set tie_word_embeddings: false there"
    )


def _equal(first: str, second: str, stored: Mapping[str, StoredTensor]) -> bool:
    rows, width = stored[first].shape
    if stored[second].shape != (rows, width):
        return False
    with PieceReader(stored) as reader:
        for start in range(0, rows, ROWS_AT_ONCE):
            index = (slice(start, min(start + ROWS_AT_ONCE, rows)), slice(0, width))
            if not torch.equal(reader.read(Piece(first, index)), reader.read(Piece(second, index))):
                return False
    return True


def _check_dtypes(path: Path, stored: dict[str, StoredTensor]) -> None:
    quantised = [
        f"{name:.120} is {tensor.dtype}"
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS and tensor.scales is None
    ]
    if quantised:
        raise ValueError(
            f"{path}: weights must be {', '.join(FLOATS)}; {', '.join(first_few(quantised))}. "
            "Dequantise quantised weights first"
        )


class PieceReader:
    """Read pieces of stored tensors. Files are opened on first use, and stay mapped until exit."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, piece: Piece) -> torch.Tensor:
        """Read the piece alone, in its shape and in the dtype of the file; a quantised one in fp32."""
        piece = in_stack(piece, self.stored)
        tensor = self.stored[piece.name]
        name = tensor.name or piece.name
        if tensor.scales is None:
            return as_parameter(self._slice(tensor.file, name, piece.index), piece)
        return as_parameter(read_quantized(self._slice, name, tensor, piece.index), piece)

    def _slice(self, file: Path, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, "pt"))
        whole = tuple(slice(part.start, part.stop) for part in index)  # safetensors reads no steps
        return self._files[file].get_slice(name)[whole][tuple(slice(None, None, part.step) for part in index)]


def as_parameter(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Return a view, in the shape of `piece`, of its part of a Hugging Face tensor."""
    if piece.axes is None:
        return part
    dropped = [axis for axis in range(part.dim()) if axis not in piece.axes]
    return part.permute(*piece.axes, *dropped)[(..., *(0 for _ in dropped))]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the files that the importer and transformers read.

    Raises:
        ValueError: if there are no safetensors, a file or the index is corrupt, or the index names a missing file or
            tensor.
    """
    found: dict[str, StoredTensor] = {}
    places = _indexed_files(path)
    files = sorted(set(places.values())) if places else [SINGLE_FILE]
    for file in files:
        header = read_header(path / file)
        twice = [name for name in header if name in found]
        if twice:
            raise ValueError(f"{twice[0]:.120} is stored twice: in {found[twice[0]].file} and in {path / file}")
        found |= header
    elsewhere = [name for name, file in places.items() if name not in found or found[name].file.name != file]
    if elsewhere:
        name = elsewhere[0]
        raise ValueError(f"{path / INDEX} says that {name:.120} is in {places[name]}, which does not hold it")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file.

    Raises:
        ValueError: if it is missing, corrupt or cut off.
    """
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt or truncated: {error}") from None


def _way_out(path: Path) -> str:
    return (
        ", and pickles (*.bin) can run code when they are opened: they are not read here. If you trust them: nemo "
        f"distill convert checkpoint={recorded_name(str(path))} output=NEW allow_pickle=true"
    )


def _indexed_files(path: Path) -> dict[str, str]:
    """Return each tensor's file from the index; empty if there is a `model.safetensors`, which takes precedence."""
    if not has_weights(path):
        raise ValueError(f"{path} holds no *.safetensors files{_way_out(path)}")
    if (path / SINGLE_FILE).is_file():
        return {}
    index = path / INDEX
    if not index.is_file():
        has_pickles = any(path.glob("pytorch_model*.bin"))
        raise ValueError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX}, which says what its other files hold"
            f"{_way_out(path) if has_pickles else ''}"
        )
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map must say in which file each tensor is, got {shown(places)}")
    names = {str(name) for name in places.values()}
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise ValueError(f"{index}: weight_map must name *.safetensors files beside it, got {shown(strange)}")
    absent = sorted(name for name in names if not (path / name).is_file())
    if absent:
        raise ValueError(f"{index} names files that are not there: {', '.join(first_few(absent))}")
    return places

"""Write the weights of a model as Hugging Face safetensors. Each rank writes what it holds, a file at a time.

The first of the tensor-parallel ranks gathers their parameters, one at a time. Besides its own weights, no rank has
more than one file's tensors in memory.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import INDEX, SINGLE_FILE, PieceReader, stored_tensors
from distill_nemo.models.checkpoints.local_parameters import LocalParameter, local_parameters, whole_tensors
from distill_nemo.models.families.pieces import OUTPUT
from distill_nemo.runtime.everyone import Everyone
from distill_nemo.runtime.files import read_object_if_any

METADATA = {"format": "pt", "producer": "distill_nemo"}  # marks our exports, which a later one may replace
MAX_FILE_BYTES = 5 * 10**9  # as transformers writes them

Sizes = dict[str, int]  # bytes of each tensor, in the order of writing


def write_weights(
    chunks: list[GPTModel],
    model: Architecture,
    directory: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    everyone: Everyone | None = None,
) -> None:
    """Write `model.safetensors`, or numbered files and their index. Collective; all ranks share the file system.

    Args:
        chunks: this rank's pipeline stages.
        model: the architecture.
        directory: exists and is empty.
        max_file_bytes: limit on the bytes of tensors in one file. A larger tensor has a file of its own.
        everyone: all ranks; None: make a new `Everyone`.

    Raises:
        OSError: if a file cannot be written.
    """
    everyone = everyone or Everyone()
    parameters = [p for chunk in chunks for p in local_parameters(chunk, model) if _is_stored(p, model)]
    own: Sizes = {}
    for parameter in filter(_writes, parameters):
        own |= _sizes(parameter)
    by_rank = _from_every_rank(own)
    plans = [plan_files(sizes, max_file_bytes) for sizes in by_rank]
    files = [names for plan in plans for names in plan]
    file_names = [SINGLE_FILE] if len(files) == 1 else [_numbered(i, len(files)) for i in range(len(files))]
    places = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
    total = sum(sum(sizes.values()) for sizes in by_rank)
    if len(files) > 1 and dist.get_rank() == 0:
        print(f"writing {len(files)} files, {total / 1e9:.1f} GB, into {directory}", flush=True)
    failure = None
    for tensors in _by_file(parameters, plans[dist.get_rank()]):
        try:
            _save(tensors, directory / places[next(iter(tensors))])
        except OSError as error:  # other ranks are in collectives: go on, and raise on all at the end
            failure = failure or error
    try:
        if len(files) > 1 and dist.get_rank() == 0:
            index = {"metadata": {"total_size": total, **METADATA}, "weight_map": dict(sorted(places.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    except OSError as error:
        failure = failure or error
    everyone.raise_errors(failure)


def _by_file(parameters: list[LocalParameter], files: list[list[str]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each file that this rank writes. Collective over the groups that share parameters."""
    waiting: dict[str, Tensor] = {}
    number = 0
    for parameter in parameters:
        parts = _gathered(parameter)
        if parts is not None:
            waiting |= {name: tensor.cpu() for name, tensor in whole_tensors(parts, parameter).items()}
        while number < len(files) and waiting.keys() >= set(files[number]):
            yield {name: waiting.pop(name) for name in files[number]}
            number += 1
    assert not waiting and number == len(files), f"not written: {sorted(waiting)[:3]}"


def check_written(chunks: list[GPTModel], model: Architecture, directory: Path, everyone: Everyone) -> None:
    """Read an export back, each rank what it holds, and compare it with the weights. Collective.

    Raises:
        RuntimeError: if a bit differs, or a file cannot be read.
    """
    failure = None
    try:
        with PieceReader(stored_tensors(directory)) as reader:
            for parameter in (p for chunk in chunks for p in local_parameters(chunk, model)):
                if _is_first_copy(parameter) and not parameter.equals(reader.read):
                    raise RuntimeError(f"{directory}: {parameter.name} is not what was written")
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        failure = error
    everyone.raise_errors(failure)


def plan_files(sizes: Sizes, max_file_bytes: int) -> list[list[str]]:
    """Return the names of each file's tensors, in order."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= size
    return files


def is_export_of_ours(directory: Path) -> bool:
    """Return True if the weights in `directory` were written by `write_weights`."""
    if not (directory / SINGLE_FILE).is_file():
        try:
            metadata = read_object_if_any(directory / INDEX).get("metadata")
        except ValueError:
            return False
        return isinstance(metadata, dict) and metadata.get("producer") == METADATA["producer"]
    try:
        with safe_open(directory / SINGLE_FILE, "pt") as tensors:
            return (tensors.metadata() or {}).get("producer") == METADATA["producer"]
    except (SafetensorError, OSError):
        return False


def _is_stored(parameter: LocalParameter, model: Architecture) -> bool:
    """Return False for a tied output layer, which on the last stage is a copy of the embedding."""
    return not (model.tie_word_embeddings and parameter.name == OUTPUT)


def _writes(parameter: LocalParameter) -> bool:
    """Return True if this rank writes the parameter: it is the first of the ranks that share or replicate it."""
    return _is_first_copy(parameter) and parameter.group.rank() == 0


def _is_first_copy(parameter: LocalParameter) -> bool:
    if parameter.of_expert:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _sizes(parameter: LocalParameter) -> Sizes:
    """Return the bytes of the whole tensors that a parameter belongs to."""
    return {name: prod(shape) * parameter.tensor.element_size() for name, shape in parameter.whole_shapes().items()}


def _from_every_rank(own: Sizes) -> list[Sizes]:
    found: list[Sizes] = [own] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, own)
    return found


def _gathered(parameter: LocalParameter) -> list[Tensor] | None:
    """Return the parts of all ranks if this rank writes the parameter, else None. Collective over its group."""
    if not _is_first_copy(parameter):
        return None
    tensor, writes = parameter.tensor.detach().contiguous(), parameter.group.rank() == 0
    if not parameter.is_split:
        return [tensor] if writes else None
    parts = [torch.empty_like(tensor) for _ in range(parameter.place.size)] if writes else None
    dist.gather(tensor, parts, group=parameter.group, group_dst=0)
    return parts


def _numbered(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, METADATA)
    except SafetensorError as error:  # raised for a full disk, say
        raise OSError(str(error)) from None

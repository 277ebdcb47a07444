"""Write the weights of a model as Hugging Face safetensors, from all ranks at once.

Every rank writes its rows of a tensor in their place. Only where tensor-parallel ranks have columns does the first of
them gather a parameter. So besides its own weights no rank has more than one parameter in memory.
"""

import json
from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.file_formats import FileFormat
from distill_nemo.models.checkpoints.hf_tensors import (
    INDEX,
    SINGLE_FILE,
    PieceReader,
    of_text_model,
    read_header,
    stored_tensors,
)
from distill_nemo.models.checkpoints.local_parameters import WholeRows
from distill_nemo.models.checkpoints.quantized import merge_scales
from distill_nemo.models.checkpoints.stated_quantization import state_quantization
from distill_nemo.models.checkpoints.stored_parameters import StoredParameter, stored_parameters
from distill_nemo.models.checkpoints.tensor_files import DTYPES, Entries, Entry, TensorFiles, as_in_file
from distill_nemo.models.checkpoints.untouched import Copies, Untouched
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.pieces import OUTPUT
from distill_nemo.models.families.tensors import Shapes, hf_shapes
from distill_nemo.models.sources import StoredTensor
from distill_nemo.models.stored_quantization import read_stored_quantization
from distill_nemo.runtime.everyone import AgreedError, Everyone
from distill_nemo.runtime.files import read_object_if_any

METADATA = {"format": "pt", "producer": "distill_nemo"}  # marks an export of ours, which a later one may replace
MAX_FILE_BYTES = 5 * 10**9  # as transformers writes them


def write_weights(
    chunks: list[GPTModel],
    model: Architecture,
    directory: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    everyone: Everyone | None = None,
    untouched: Untouched | None = None,
    file_format: FileFormat | None = None,
) -> None:
    """Write `model.safetensors`, or numbered files and their index. Collective; all ranks share the file system.

    Files that are there already and hold, bit for bit, what they should are kept; others are removed.

    Args:
        chunks: this rank's pipeline stages.
        model: the architecture.
        directory: exists, and holds no safetensors but those of an interrupted call.
        max_file_bytes: limit on the bytes of tensors in one file. A larger tensor has a file of its own.
        everyone: all ranks; None: make a new `Everyone`.
        untouched: tensors of other files to copy, the same on every rank.
        file_format: of quantised parameters, which files beside the weights state, too; None: in their dtype, rounded.

    Raises:
        OSError: if a file cannot be written.
    """
    everyone, untouched = everyone or Everyone(), untouched or Untouched({})
    parameters = [
        stored
        for stored in stored_parameters(chunks, model, file_format)
        if not (model.tie_word_embeddings and stored.parameter.name == OUTPUT)  # on the last stage a copy
    ]
    shapes = hf_shapes(model)
    by_rank = _plan(parameters, untouched, shapes, max_file_bytes)
    copies = Copies(untouched)
    files = {file: entries for own in by_rank for file, entries in own.items()}
    missing = files.keys() - _whole_files(parameters, copies, files, directory)
    _announce(files, missing, directory)
    failure: OSError | SafetensorError | None = None
    with TensorFiles(directory, {file: files[file] for file in files if file in missing}, METADATA) as writing:
        try:
            prepare_directory(files, directory)
            if file_format is not None and model.quantization is not None and dist.get_rank() == 0:
                stored = (as_in_file(entries) for entries in files.values())
                state_quantization(directory, model.quantization, file_format, ChainMap(*stored))
            for file in by_rank[dist.get_rank()].keys() & missing:
                writing.create(file)
        except OSError as error:
            failure = error
        everyone.raise_errors(failure)
        for parameter in parameters:
            if not any(name in writing for name in parameter.entries(shapes)):
                continue
            rows = parameter.rows()
            try:
                if failure is None:
                    _write(rows, writing)
            except OSError as error:  # other ranks are in collectives: go on, and raise on all at the end
                failure = error
        try:
            if failure is None:
                copies.write(writing)
        except (OSError, SafetensorError) as error:
            failure = error
    everyone.raise_errors(failure)


def _plan(
    parameters: Iterable[StoredParameter], untouched: Untouched, shapes: Shapes, limit: int
) -> list[dict[str, Entries]]:
    """Return the files that each rank creates, and their tensors. The first rank that has rows of a tensor counts."""
    own = {
        name: entry._replace(name=untouched.name_beside(name))
        for stored in parameters
        if stored.parameter.is_first_copy and stored.parameter.group.rank() == 0
        for name, entry in stored.entries(shapes).items()
    }
    planned: list[list[Entries]] = []
    seen: set[str] = set()
    for of_rank in _from_every_rank(own | Copies(untouched).entries):
        entries = {name: entry for name, entry in of_rank.items() if name not in seen}
        seen |= entries.keys()
        names = plan_files({name: entry.nbytes for name, entry in entries.items()}, limit)
        planned.append([_aligned({name: entries[name] for name in of_file}) for of_file in names])
    total = sum(map(len, planned))
    numbers = iter(range(total))
    return [{file_name(next(numbers), total): entries for entries in of_rank} for of_rank in planned]


def _aligned(entries: Entries) -> Entries:
    """Return the entries in an order in which each begins at a multiple of its values' size."""
    return dict(sorted(entries.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize))


def _whole_files(
    parameters: list[StoredParameter], copies: Copies, files: dict[str, Entries], directory: Path
) -> set[str]:
    """Return the files in `directory` that hold what the ranks hold. Collective."""
    stored = {file: _stored(directory / file) for file in files}
    own = {file for file, entries in files.items() if stored[file] == as_in_file(entries)}
    whole = set.intersection(*_from_every_rank(own))
    place = {name: file for file in whole for name in files[file]}
    there = {
        name: StoredTensor(directory / file, entry.dtype, entry.shape, name=entry.name)
        for file in whole
        for name, entry in files[file].items()
    }
    with PieceReader(there) as reader:
        for parameter in parameters:
            whole -= {place[name] for name in parameter.differing(place, reader.read)}
    whole -= {place[name] for name in copies.differing(there, there)}
    return set.intersection(*_from_every_rank(whole))


def _stored(file: Path) -> Entries | None:
    try:
        return {name: Entry(tensor.dtype, tensor.shape) for name, tensor in read_header(file).items()}
    except ValueError:  # missing, or cut off
        return None


def _announce(files: dict[str, Entries], missing: set[str], directory: Path) -> None:
    if len(files) < 2 or dist.get_rank() != 0:
        return
    kept = (
        f"{len(files) - len(missing)} files of an interrupted export are whole; " if len(missing) < len(files) else ""
    )
    size = sum(entry.nbytes for file in missing for entry in files[file].values())
    print(f"{kept}writing {len(missing)} files, {size / 1e9:.1f} GB, into {directory}", flush=True)


def prepare_directory(files: dict[str, Entries], directory: Path) -> None:
    """Remove safetensors that do not belong there, and write the index. On rank 0 only."""
    if dist.get_rank() != 0:
        return
    for path in {*directory.glob("*.safetensors"), directory / INDEX}:
        if path.name not in files:
            path.unlink(missing_ok=True)
    if len(files) > 1:
        places = {name: file for file, entries in files.items() for name in as_in_file(entries)}
        total = sum(entry.nbytes for entries in files.values() for entry in entries.values())
        index = {"metadata": {"total_size": total, **METADATA}, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write(several: list[WholeRows], writing: TensorFiles) -> None:
    for name, first, rows in several:
        if name in writing:
            writing.write(name, rows, first)


def check_written(
    chunks: list[GPTModel],
    model: Architecture,
    directory: Path,
    everyone: Everyone,
    untouched: Untouched | None = None,
    file_format: FileFormat | None = None,
) -> None:
    """Read an export back, each rank what it holds or copied, and compare it with the weights. Collective.

    Quantised ones are dequantised, and compared with those that the student computes with.

    Raises:
        RuntimeError: if a bit of a plain one differs, a quantised one differs by more than fp32's rounding, or a file
            cannot be read.
    """
    failure = None
    try:
        stored = stored_tensors(directory)
        config = read_stored_quantization(read_object_if_any(directory / "config.json"), str(directory / "config.json"))
        own = stored | merge_scales(directory, stored, config) if config is not None else stored
        with PieceReader(own := of_text_model(own, FAMILIES[model.family])) as reader:
            for parameter in stored_parameters(chunks, model, file_format):
                if not parameter.parameter.is_first_copy:
                    continue
                for name in (each for each in parameter.names if each not in own):
                    raise AgreedError(f"{directory}: {name} was not written")
                for name in parameter.wrong(reader.read):
                    raise AgreedError(f"{directory}: {name} is not what was written")
        copies = Copies(untouched or Untouched({}))
        for name in copies.differing(stored, copies.stored):
            raise AgreedError(f"{directory}: {name} is not what was copied")
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        failure = error
    everyone.raise_errors(failure)


def plan_files(sizes: dict[str, int], max_file_bytes: int) -> list[list[str]]:
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


def _from_every_rank[T](own: T) -> list[T]:
    found = [own] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, own)
    return found


def file_name(number: int, total: int) -> str:
    """Return the name of one of `total` files of weights, counted from 0."""
    return SINGLE_FILE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

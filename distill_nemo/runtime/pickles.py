"""Read distributed checkpoints without executing code from them.

torch 2.13 unpickles two things unchecked: the table of contents (`FileSystemReader.read_metadata`), and any entry of a
`.distcp` that the caller or the table does not declare to be a tensor (`DefaultLoadPlanner.load_bytes`).
"""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, Metadata

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip


class _Contents(pickle.Unpickler):
    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in CLASSES.get(module_name, ()):
            raise ValueError(
                f"{self.path} is not loaded: it names {module_name}.{global_name}, which no table of contents needs "
                "and which could run code of its author's choice"
            )
        return super().find_class(module_name, global_name)


def read_contents(directory: Path) -> Metadata:
    """Return a distributed checkpoint's table of contents, unpickled with its own classes only.

    Raises:
        ValueError: if `.metadata` is missing or damaged, or names another class.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            contents = _Contents(path, file).load()
    except ValueError:
        raise
    except Exception as error:  # a truncated pickle can raise anything
        raise ValueError(f"{path} is missing, corrupt or truncated: {error!r:.200}") from None
    if not isinstance(contents, Metadata):
        raise ValueError(f"{path} is corrupt: it holds a {type(contents).__name__}, and no table of contents")
    return contents


@contextlib.contextmanager
def weights_only(directory: Path) -> Iterator[None]:
    """Restrict torch, and through it Megatron and ModelOpt, to tensors and plain values of a checkpoint.

    torch reads the environment at each `torch.load`; this setting overrides `weights_only=False` of the call.

    Raises:
        ValueError: if a table of contents or an object names anything else, or if the files cannot be read.
    """
    for contents in (
        directory / ".metadata",
        *sorted(directory.glob("*/.metadata")),
    ):  # the second are ModelOpt's
        read_contents(contents.parent)
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(directory, error)) from error
    except CheckpointException as error:  # torch's wrapper of any error, a BaseException
        cause: BaseException = next((failure for failure, _ in error.failures.values()), error)
        if not isinstance(cause, Exception):
            raise  # Ctrl-C
        raise ValueError(_refusal(directory, cause)) from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refusal(directory: Path, cause: Exception) -> str:
    named = re.search(r"(?:GLOBAL|function) (\S+)", str(cause)) if isinstance(cause, pickle.UnpicklingError) else None
    if named is None:
        return f"{directory} cannot be read, and may be corrupt: {cause!r:.300}"
    return (
        f"{directory} is not loaded: an object in it names {named[1]}, which could run code of its author's choice; "
        "use a checkpoint of tensors and plain values only"
    )

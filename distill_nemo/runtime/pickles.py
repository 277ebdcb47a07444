"""A checkpoint's table of contents is a pickle, which could run anything: read it with nothing but its own classes.

torch's `FileSystemReader.read_metadata` (2.13) unpickles `.metadata` without a look; what reaches it was read
here first, where no other class is known.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

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


def check_contents(path: Path) -> None:
    """Raise unless the pickle `path` holds nothing but a table of contents.

    Raises:
        ValueError: naming the file and the class. A pickle that is cut or damaged raises whatever it raises.
    """
    with path.open("rb") as file:
        _Contents(path, file).load()

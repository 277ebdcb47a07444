"""Checkpoints that would run code: objects that create a file when they are unpickled, in every possible place."""

import hashlib
import io
import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

HOSTILE = "hostile.distcp"


class Runs:
    """Object that creates `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def plant(directory: Path, key: str, executed: Path) -> None:
    """Store an object that runs code under the first stored name that contains `key`, tensor or not.

    Megatron-Core 0.18 keeps ModelOpt's `common_state` in a file of its own.
    """
    if key == "common_state" and (directory / "common.pt").is_file():
        torch.save([Runs(executed)], directory / "common.pt")
        return
    contents = pickle.loads((directory / ".metadata").read_bytes())
    names = sorted(contents.state_dict_metadata, key=lambda name: name.find(key))
    name = next(name for name in names if key in name)  # the beginning of its storage, if there is one
    buffer = io.BytesIO()
    torch.save([Runs(executed)], buffer)
    (directory / HOSTILE).write_bytes(buffer.getvalue())
    contents.state_dict_metadata[name] = BytesStorageMetadata()
    contents.storage_data = {index: info for index, info in contents.storage_data.items() if index.fqn != name}
    contents.storage_data[MetadataIndex(name)] = _StorageInfo(HOSTILE, 0, len(buffer.getvalue()))
    (directory / ".metadata").write_bytes(pickle.dumps(contents))


def write_sums(checkpoint: Path) -> None:
    """Update the sums to the present files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(checkpoint).as_posix()}\n" for f in files]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))

"""What a run was made of, by content. No torch.

A path is not enough to know a teacher or token files again: they may have been replaced under it, or moved away.
"""

import hashlib
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig, to_dict
from distill_nemo.models.sources import find_checkpoint

WEIGHTS = ("*.safetensors", "*.distcp", ".metadata", "common.pt")
SAMPLES, SAMPLE_BYTES = 32, 4096


def run_record(config: RunConfig) -> dict[str, Any]:
    """`run.json`: the whole config, and under `identity` hashes of the teacher's weights and of the token files."""
    teacher = config.teacher.checkpoint if config.teacher else None
    identity = {
        "teacher.checkpoint": weights_hash(Path(teacher)) if teacher else None,
        "data.train": token_files_hash(config.data.train),
        "data.valid": token_files_hash(config.data.valid),
    }
    return to_dict(config) | {"identity": identity}


def weights_hash(checkpoint: Path) -> str:
    """Of names, sizes and samples of the files that hold the weights, wherever their directory lies."""
    directory = find_checkpoint(checkpoint).weights
    digest = hashlib.sha256()
    for file in sorted(file for pattern in WEIGHTS for file in directory.glob(pattern)):
        _add(digest, file.name, file)
    return digest.hexdigest()


def token_files_hash(blend: list[str]) -> str:
    """Of weights, sizes and samples of the `.bin/.idx` pairs of a blend, whatever their names."""
    digest = hashlib.sha256()
    for value in blend:
        files = [Path(value + suffix) for suffix in (".idx", ".bin")]
        if not files[0].is_file():  # a weight
            digest.update(f"{float(value)}\n".encode())
            continue
        for file in files:
            _add(digest, file.suffix, file)
    return digest.hexdigest()


def _add(digest: Any, name: str, path: Path) -> None:
    """Samples spread evenly over the file: a file of 10 GB costs no more than one of 1 MB."""
    size = path.stat().st_size
    digest.update(f"{name}:{size}\n".encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))

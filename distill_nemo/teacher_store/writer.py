"""Write a store: shards of windows, in any order and by any number of jobs. Nothing half written is ever read.

A shard is written aside, flushed and renamed; then the facts of the manifest are written beside it, which mark it as
whole. The complete manifest comes last.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from distill_nemo.config_files import from_dict
from distill_nemo.fields import require
from distill_nemo.runtime.checksums import sha256
from distill_nemo.runtime.files import read_object, write_atomically, write_blocks_atomically
from distill_nemo.runtime.output_lock import OutputLock
from distill_nemo.teacher_store.codecs.codec import DTYPES, Arrays, check_ids
from distill_nemo.teacher_store.manifest import (
    MANIFEST,
    OUTPUT_LAYER,
    Contents,
    Manifest,
    ShardFacts,
    differences,
    is_store,
    manifest_text,
    read_store_manifest,
    shard_name,
)
from distill_nemo.teacher_store.packing import pack_bits, pack_numbers
from distill_nemo.teacher_store.shards import NUMBERS, Layout, columns_of, shard_layout

POLL_SECONDS = 0.2  # while another job writes the manifest or the output layer

_claimed: set[Path] = set()  # by this process, which its own locks do not keep out


def create_store(store: Path, manifest: Manifest) -> None:
    """Create a store, or check that the one that is there is the same. Several jobs may call it at once.

    Raises:
        ValueError: if another store is there, naming each difference, or no directory can be made.
        OSError: if it cannot be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output = {store} cannot be made: {error.strerror}; choose another directory") from None
    if not (store / MANIFEST).exists():
        with one_job_at_a_time(store / MANIFEST):
            if not (store / MANIFEST).exists():
                strange = [path.name for path in store.iterdir() if path.suffix not in (".partial", ".lock")]
                require(not strange, f"{store} holds other files, such as {strange[:1]}: choose another output")
                write_atomically(store / MANIFEST, manifest_text(manifest))
    apart = differences(manifest, read_store_manifest(store)[0])
    lines = "\n  ".join([f"{store} is another store:", *apart])
    require(not apart, f"{lines}\nRestore these, or choose another output")


def is_complete(store: Path) -> bool:
    """Return True if the manifest is complete. Ask for facts before, since they are removed afterwards.

    Raises:
        ValueError: if the manifest is damaged.
    """
    return is_store(store) and read_store_manifest(store)[1] is not None


class WrittenShards:
    """Shards of a store that are whole, whichever job wrote them. Each one is opened once, so it is cheap to ask again.

    Args:
        store: directory.
        manifest: of the store.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._store, self._manifest = store, manifest
        self._sizes: dict[int, int] = {}  # bytes of those that were seen

    def missing(self) -> list[int]:
        """Look again. Return the numbers of the shards that are not written yet; none of a complete store."""
        with os.scandir(self._store) as entries:
            names = {entry.name for entry in entries}
        unseen = [shard for shard in range(self._manifest.num_shards) if shard not in self._sizes]
        for shard in unseen:
            if _facts_of(Path(shard_name(shard))).name in names:
                facts = _written(self._store, self._manifest, shard)
                if facts is not None:
                    self._sizes[shard] = shard_layout(self._manifest, shard, facts).size
        left = [shard for shard in unseen if shard not in self._sizes]
        return left if left and not is_complete(self._store) else []

    @property
    def num_windows(self) -> int:
        """Number of windows in them."""
        return sum(len(self._manifest.windows_of(shard)) for shard in self._sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes of them."""
        return sum(self._sizes.values())


def finish_store(store: Path) -> bool:
    """Write the complete manifest, if no shard is missing. Return True if the store is complete.

    Jobs that wrote the last shards call it at the same moment; one waits for the other.

    Raises:
        OSError: if it cannot be written.
    """
    with one_job_at_a_time(store / MANIFEST):
        manifest, contents = read_store_manifest(store)
        if contents is None:
            found = [_written(store, manifest, shard) for shard in range(manifest.num_shards)]
            shards = [facts for facts in found if facts is not None]
            if len(shards) < len(found):
                return False
            layer = sha256(store / OUTPUT_LAYER) if manifest.codec == "hidden" else None
            write_atomically(store / MANIFEST, manifest_text(manifest, Contents(shards, layer)))
        for pattern in ("shard-*.json", "shard-*.lock", "output_layer.lock", "*.partial"):
            for path in store.glob(pattern):
                path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def one_job_at_a_time(path: Path) -> Iterator[None]:
    """Wait for other jobs that write this file of a store, and keep them waiting. A job that dies keeps nobody."""
    lock = OutputLock(path.with_suffix(".lock"), f"output = {path.parent}")
    while not lock.take_if_free():
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.free()


def claim_shard(store: Path, manifest: Manifest, shard: int) -> "ShardWriter | None":
    """Return the writer of a shard; None if it is written already, or another writer has it.

    Raises:
        OSError: if the store cannot be written.
    """
    path = store / shard_name(shard)
    lock = OutputLock(path.with_suffix(".lock"), f"output = {store}")
    if path in _claimed or _written(store, manifest, shard) is not None or not lock.take_if_free():
        return None
    if _is_written(store, manifest, shard):
        lock.free()
        return None
    return ShardWriter(path, manifest, shard, lock)


class ShardWriter:
    """Writer of one shard, which nobody else writes until it is closed.

    Use as a context manager: windows that were not committed are dropped.
    """

    def __init__(self, path: Path, manifest: Manifest, shard: int, lock: OutputLock) -> None:
        self.path, self.windows = path, manifest.windows_of(shard)
        self.shard, self._manifest, self._lock = shard, manifest, lock
        self._columns = columns_of(manifest)
        self._blocks: dict[str, list[np.ndarray]] = {name: [] for name in self._columns}
        self.num_bytes = 0  # of the windows so far
        _claimed.add(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def num_appended(self) -> int:
        """Number of windows so far."""
        return len(self._blocks["tokens"])

    def append(self, window: Arrays) -> None:
        """Add the next window.

        Args:
            window: tokens int32 [L + 1]; loss_mask uint8 [L]; document_starts int32 [L], if documents are apart; and of
                the M tokens that count, in order, entropy, label_logprob, top1, [M], if T is not 1 also entropy_at_1,
                and what the codec has, [M, ...] (its `fields`).

        Raises:
            ValueError: for an array that is missing, has another shape, or holds what cannot be.
        """
        number = self.windows[self.num_appended]
        try:
            packed = self._packed(window)
        except ValueError as error:
            raise ValueError(f"window {number} of {self.path.parent} {error}") from None
        for name, block in packed.items():
            self._blocks[name].append(block)
            self.num_bytes += block.nbytes

    def commit(self) -> None:
        """Write the shard durably, unless another writer has done so meanwhile. After an error nothing of it is left.

        Locks see to it already, but some file systems have none, and some show a new file late.

        Raises:
            OSError: if it cannot be written.
        """
        assert self.num_appended == len(self.windows), "every window of the shard is appended"
        if _is_written(self.path.parent, self._manifest, self.shard):
            return
        for axis in ("tokens", "pairs"):
            if f"{axis}_bounds" in self._columns:
                names = [name for name, column in self._columns.items() if column.axis == axis]
                sizes = [len(block) for block in self._blocks[names[0]]]
                self._blocks[f"{axis}_bounds"] = [np.cumsum([0, *sizes], dtype=np.int64)]
        tokens, pairs = (sum(map(len, self._blocks.get(name, []))) for name in ("top1", "pairs"))
        layout = shard_layout(self._manifest, self.shard, ShardFacts("", tokens, pairs))
        written = write_columns(self.path, layout, (block for name in self._columns for block in self._blocks[name]))
        write_atomically(_facts_of(self.path), json.dumps(asdict(ShardFacts(written, tokens, pairs))))

    def close(self) -> None:
        """Let others write the shard, if it is not committed."""
        self._lock.free()
        _claimed.discard(self.path)

    def _packed(self, window: Arrays) -> Arrays:
        manifest, coding, length = self._manifest, self._manifest.coding, self._manifest.sequence_length
        num_tokens = int((window["loss_mask"] != 0).sum())
        wanted = {"tokens": ((length + 1,), "int32"), "loss_mask": ((length,), "uint8")}
        wanted |= {"document_starts": ((length,), "int32")} if manifest.documents_apart else {}
        fields = {name: each for name, each in manifest.fields.items() if name != "has_targets"}
        wanted |= {name: ((num_tokens, *each.shape), each.dtype) for name, each in fields.items()}
        for name, (shape, kind) in wanted.items():
            require(name in window, f"has no {name}")
            found = window[name]
            require(
                found.shape == shape and found.dtype == kind,
                f"has {name} of {found.dtype} {list(found.shape)}, needs {kind} {list(shape)}",
            )
        for name in ("tokens", "top1"):
            check_ids(window[name], manifest.vocab_size)
        for name in ("entropy", "label_logprob"):
            require(bool(np.isfinite(window[name]).all()), f"has {name} that is not finite, as the teacher's logits")
        packed = {name: window[name] for name in NUMBERS if name in fields}
        packed |= {name: pack_numbers(window[name], coding.id_bytes) for name in ("tokens", "top1")}
        packed |= {"loss_mask": pack_bits(window["loss_mask"])} | coding.pack(window)
        if manifest.documents_apart:
            packed["document_begins"] = pack_bits(window["document_starts"] == np.arange(length))
        rows = {name: packed[name][None] for name, column in self._columns.items() if column.axis == "windows"}
        return {
            name: np.ascontiguousarray(block, DTYPES[self._columns[name].dtype])
            for name, block in (packed | rows).items()
        }


def write_columns(path: Path, layout: Layout, columns: Iterable[np.ndarray]) -> str:
    """Write a file of columns durably. Return its SHA-256."""
    blocks = [layout.header, *(block.data for block in columns)]
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    write_blocks_atomically(path, blocks)
    return digest.hexdigest()


def _is_written(store: Path, manifest: Manifest, shard: int) -> bool:
    """Return True if a shard is whole, or the store is. Facts come first, as they go when the manifest is complete."""
    return _written(store, manifest, shard) is not None or is_complete(store)


def _written(store: Path, manifest: Manifest, shard: int) -> ShardFacts | None:
    """Return the facts of a shard that was written as a whole."""
    path = store / shard_name(shard)
    try:
        facts = from_dict(read_object(_facts_of(path)), ShardFacts)
        size = shard_layout(manifest, shard, facts).size
        return facts if path.stat().st_size == size else None
    except (ValueError, OSError):
        return None


def _facts_of(shard: Path) -> Path:
    return shard.with_suffix(".json")

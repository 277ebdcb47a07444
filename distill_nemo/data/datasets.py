"""Megatron's GPT datasets over token files: samples in an order of ours, each id checked against the vocabulary."""

import hashlib
import itertools
import json
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.token_files import (
    OWN_TOKENIZER,
    Blend,
    check_token_files,
    document_lengths,
    parse_blend,
    to_number,
)

ORDER = "pass by pass"  # of the samples; a part of the cache's key


class _NoTokenizer:
    """Megatron wants a tokenizer for masks that are switched off here. It takes `pad` out of every sample."""

    eod = None
    pad = -(2**63)  # no token file has it
    vocab_size = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    num_ids: int = 0  # ids that the model has, without padding


class WatchedGPTDataset(GPTDataset):
    """Megatron's, with three differences.

    - The order of samples does not depend on how many are asked for: Megatron shuffles all passes together.
    - An id that the model lacks is refused on the host, where file, document and token can still be named.
    - A file that was cut short after it was mapped is refused; Megatron would die of SIGBUS.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.config
        self._prefix, self._num_ids = str(self.dataset_path), config.num_ids
        self._sizes = {path: os.stat(path).st_size for path in (f"{self._prefix}.bin", f"{self._prefix}.idx")}

    @property
    def _document_lengths(self) -> np.ndarray:
        files: Any = self.dataset
        return files.sequence_lengths

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """One sample.

        Raises:
            ValueError: when it holds an id that the model lacks, or a token file of it is shorter than when the run
                began.
            FileNotFoundError: when one is gone.
        """
        for path, size in self._sizes.items():
            if (now := os.stat(path).st_size) < size:
                raise ValueError(
                    f"{path} has {now} bytes now, and had {size} when this run began: put it back as it was, and the "
                    "same command goes on from the last checkpoint"
                )
        sample = super().__getitem__(idx)
        for name in ("tokens", "labels"):
            ids = sample[name].numpy()
            if ids.min() < 0 or ids.max() >= self._num_ids:
                raise ValueError(self._name_first_bad_id(idx or 0))
        return sample

    def _name_first_bad_id(self, idx: int) -> str:
        ids, documents, *_ = self._query_document_sample_shuffle_indices(idx)
        where = np.flatnonzero((ids < 0) | (ids >= self._num_ids))[0]
        left, start = where, self.sample_index[self.shuffle_index[idx]][1]  # in the first of the documents
        for document in documents:
            length = self._document_lengths[document] - start
            if left < length:
                break
            left, start = left - length, 0
        return (
            f"{self._prefix}.bin: token {start + left} of document {document} (both from 0) is the id {ids[where]}, "
            f"but the model has the ids 0 to {self._num_ids - 1}: {OWN_TOKENIZER}"
        )

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the order from the cache; the first to come there builds it, which Megatron's builder lets rank 0 be."""
        stem = Path(str(self.config.path_to_cache), f"{self.unique_description_hash}-{self.index_split.name}")
        files = [stem.with_name(f"{stem.name}-{name}.npy") for name in ("documents", "samples", "shuffle")]
        if not all(file.is_file() for file in files):
            stem.parent.mkdir(parents=True, exist_ok=True)
            for file, index in zip(files, self._build_order(), strict=True):
                np.save(file, index)
        documents, samples, shuffle = (_map(file) for file in files)
        return documents, samples, shuffle

    def _build_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of all passes, the samples cut from them in a row, and the order in which samples are read.

        Each pass shuffles its documents, then its samples. One that reaches into the next pass belongs to that. So more
        passes change nothing before them, and a single pass is in Megatron's own order.

        Returns:
            Documents int32 [passes * documents]; (position in it, offset) where each sample begins, and the last one
            ends [samples + 1, 2]; samples [samples].
        """
        assert self.num_samples is not None, "build_datasets asks for a number"
        lengths = np.array(self._document_lengths)  # a copy: the file's is not aligned
        length, pass_tokens = self.config.sequence_length, int(lengths[self.indices].sum(dtype=np.int64))
        num_passes = -(-(self.num_samples * length + 1) // pass_tokens)
        ends = [max(i * pass_tokens - 1, 0) // length for i in range(num_passes + 1)]  # whole samples of i passes
        random = np.random.RandomState(self.config.random_seed)
        passes = [
            (random.permutation(self.indices), random.permutation(np.arange(first, last)))
            for first, last in itertools.pairwise(ends)
        ]
        documents, shuffle = (np.concatenate(parts) for parts in zip(*passes, strict=True))
        samples = helpers.build_sample_idx(lengths, documents, length, num_passes, pass_tokens)
        return documents, samples, shuffle


def build_datasets(
    data: DataConfig,
    training: TrainingConfig,
    cache_dir: Path,
    num_train_samples: int,
    num_valid_samples: int,
    vocab_size: int,
) -> tuple[Dataset, Dataset | None]:
    """The training and validation samples of a run, shuffled by `training.data_seed` (default `training.seed`).

    Samples repeat in passes as needed. Their order depends on the seed, the files and the sequence length; not on the
    layout, nor on how many are asked for. Collective when torch.distributed is initialised: rank 0 builds the index
    cache, the others read it.

    Args:
        data: token files, blends, split, sequence length.
        training: for the seed.
        cache_dir: index cache, shared by all ranks. Each set of files and options has its own folder in it.
        num_train_samples: at least so many samples (sequences) are in the training set.
        num_valid_samples: the same for validation; with 0 none is built.
        vocab_size: ids that the model has, without padding.

    Returns:
        Two datasets whose items are dicts of tokens, labels, loss_mask and position_ids, each [sequence_length].

    Raises:
        ValueError: bad token files, weights or split, or a split without any text.
        OSError: when the index cache cannot be written.
    """
    check_token_files(data)
    seed = training.seed if training.data_seed is None else training.data_seed
    blends = [_blend("data.train", data.train), _blend("data.valid", data.valid) if data.valid else None, None]
    common = {
        "random_seed": seed,
        "sequence_length": data.sequence_length,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "tokenizer": _NoTokenizer(),
        "num_ids": vocab_size,
    }
    sizes = [num_train_samples, num_valid_samples, 0]
    key = _cache_key([ORDER, blends, data.split, seed, data.sequence_length, sizes], blends)
    path, final = _cache_path(Path(cache_dir), key)
    if data.valid:
        blends[1] = blends[1] if num_valid_samples else None
        config = _DatasetConfig(blend_per_split=blends, path_to_cache=str(path), **common)
    else:
        _check_split(data.split)
        config = _DatasetConfig(blend=blends[0], split=data.split, path_to_cache=str(path), **common)
        assert config.split_matrix is not None, "Megatron computes it from split"
        train_bounds, valid_bounds, _ = config.split_matrix
        _check_not_empty(data, "training", train_bounds)
        if num_valid_samples:
            _check_not_empty(data, "validation", valid_bounds)
        config.split_matrix = [train_bounds, valid_bounds if num_valid_samples else None, None]  # pyright: ignore
    built = _build(sizes, config, path)
    _publish(path, final)
    train, valid = built[Split.train.value], built[Split.valid.value]
    assert train is not None and (valid is not None or not num_valid_samples), "Megatron built no dataset"
    return train, valid


def _build(sizes: list[int], config: _DatasetConfig, path: Path) -> list[Any]:
    """Run Megatron's builder, which hides a disk's error on rank 0 behind an advice about its own options."""
    try:
        built = BlendedMegatronDatasetBuilder(WatchedGPTDataset, sizes, lambda: True, config).build()
        for file in path.glob("*.npy"):  # the blend's own
            _map(file)
        return built
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        if path.suffix == ".tmp":
            shutil.rmtree(path, ignore_errors=True)
        there = next(parent for parent in path.absolute().parents if parent.exists())
        raise OSError(
            f"the index cache {path.parent} could not be written ({shutil.disk_usage(there).free / 2**30:.2f} GiB "
            f"free): {cause}. Free space, or name another directory: data.cache"
        ) from error


def _map(file: Path) -> np.ndarray:
    """Map an array that `np.save` wrote, which says nothing of a last block that did not fit on the disk."""
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise OSError(f"{file} was cut short ({error})") from error


def _blend(field: str, values: list[str]) -> Blend:
    """Without weights, files are weighted by their tokens: Megatron would stop such a blend after one epoch."""
    prefixes, weights = parse_blend(field, values)
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(document_lengths(p).sum(dtype=np.int64)) for p in prefixes]


def _check_split(split: str) -> None:
    weights = [to_number(part) for part in split.split(",")]
    good = [weight for weight in weights if weight is not None and math.isfinite(weight) and weight >= 0]
    if not 1 <= len(weights) <= 3 or len(good) != len(weights) or not sum(good):
        raise ValueError(f'data.split must be weights of train,valid,test such as "969,30,1", got "{split}"')


def _check_not_empty(data: DataConfig, name: str, bounds: tuple[float, float] | None) -> None:
    """Refuse a split without tokens: Megatron would count its epochs for ever."""
    for prefix in parse_blend("data.train", data.train)[0]:
        lengths = document_lengths(prefix)
        first, last = (round(end * float(len(lengths))) for end in bounds or (0.0, 0.0))  # as Megatron rounds
        if not lengths[first:last].sum(dtype=np.int64):
            raise ValueError(
                f'data.split = "{data.split}" leaves nothing of the {len(lengths)} documents of {prefix} for '
                f"{name}: change data.split, prepare more documents, or set data.valid"
            )


def _cache_key(options: list, blends: list[Blend | None]) -> str:
    """Megatron's own keys know paths, not contents: files made anew under an old name would get the old order."""
    files = [Path(prefix + suffix) for blend in blends if blend for prefix in blend[0] for suffix in (".idx", ".bin")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()[:16]


def _cache_path(cache_dir: Path, key: str) -> tuple[Path, Path]:
    """(where to build or read, where it belongs): rank 0 decides. A cache is built aside, so it is whole or absent."""
    final = cache_dir / key
    path = final if final.is_dir() else cache_dir / f"{key}.{uuid.uuid4().hex}.tmp"
    if torch.distributed.is_initialized():
        chosen = [str(path)]
        torch.distributed.broadcast_object_list(chosen, src=0)
        path = Path(chosen[0])
    return path, final


def _publish(path: Path, final: Path) -> None:
    """Move a cache that all ranks have opened to its place; mapped files stay mapped."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if path != final and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        try:
            os.rename(path, final)
        except OSError:  # another run was first; ours stays mapped where it is
            pass

"""Megatron's GPT datasets over token files, with our order of samples and every id checked."""

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
import torch
import torch.distributed
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.token_files import (
    OWN_TOKENIZER,
    Blend,
    check_token_files,
    document_lengths,
    parse_blend,
    to_number,
)
from distill_nemo.data.token_masks import TokenMask
from distill_nemo.runtime.watched_file import WatchedFile

ORDER = "pass by pass"  # order of the samples, part of the cache's key


class _NoTokenizer:
    """Stand-in for the tokenizer that Megatron needs for masks, which are off here. `pad` is cut out of samples."""

    eod = None
    pad = -(2**63)  # occurs in no token file
    vocab_size = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    num_ids: int = 0  # of the model, without padding
    loss_on: LossOn | None = None  # see DataConfig
    reset_at_documents: bool = False


class WatchedGPTDataset(GPTDataset):
    """Megatron's dataset with four differences.

    - The order of samples does not depend on their number. Megatron shuffles all passes over the data together.
    - An id that the model lacks is refused on the host, which can name file, document and token.
    - Tokens that a mask beside the token files leaves out do not count as labels.
    - A file that becomes shorter is refused. Megatron maps it, and would be killed by SIGBUS.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        assert isinstance(config, _DatasetConfig)
        self._prefix, self._num_ids = str(self.dataset_path), config.num_ids
        self._documents_apart = config.reset_at_documents
        files = [f"{self._prefix}{suffix}" for suffix in (".bin", ".idx", ".mask")]
        self._watched = [WatchedFile(path) for path in files if os.path.exists(path)]
        self._files.bin_reader = self._watched[0]  # pyright: ignore[reportAttributeAccessIssue]
        masked = self._watched[-1].path == files[-1] and config.loss_on != "all"
        self._mask = TokenMask(self._prefix, config.loss_on == "last") if masked else None

    @property
    def _document_lengths(self) -> np.ndarray:
        return self._files.sequence_lengths

    @property
    def _files(self) -> IndexedDataset:
        assert isinstance(self.dataset, IndexedDataset)
        return self.dataset

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Return a sample.

        Raises:
            ValueError: if it holds an id that the model lacks, or a token file is shorter than when the run began.
            FileNotFoundError: if a token file is gone.
        """
        for file in self._watched:
            file.check()
        sample = super().__getitem__(idx)
        for name in ("tokens", "labels"):
            ids = sample[name].numpy()
            if ids.min() < 0 or ids.max() >= self._num_ids:
                raise ValueError(self._name_first_bad_id(idx or 0))
        if self._mask is not None and idx is not None:
            sample["loss_mask"] = sample["loss_mask"] * self._label_mask(self._mask, idx)  # Megatron's is shared
        if self._documents_apart:
            sample |= self._apart(sample, idx or 0)
        return sample

    def _parts(self, idx: int) -> list[tuple[int, int, int]]:
        """Return (document, first token, past the last one) of each part of a sample and its last label."""
        number = self.shuffle_index[idx]
        (first, start), (last, end) = self.sample_index[number], self.sample_index[number + 1]
        documents = [int(document) for document in self.document_index[first : last + 1]]
        firsts = [int(start), *[0] * (len(documents) - 1)]
        stops = [*(int(self._document_lengths[document]) for document in documents[:-1]), int(end) + 1]
        return list(zip(documents, firsts, stops, strict=True))

    def _label_mask(self, mask: TokenMask, idx: int) -> Tensor:
        """Return 1 for each label of a sample that counts, float32 [sequence_length]."""
        index, found = self._files.index, []
        for document, first, stop in self._parts(idx):
            before = int(index.sequence_pointers[document]) // index.dtype_size
            found.append(mask.of_document(before, int(self._document_lengths[document]))[first:stop])
        return torch.from_numpy(np.concatenate(found)[1:]).float()

    def _apart(self, sample: dict[str, Tensor], idx: int) -> dict[str, Tensor]:
        """Return positions in documents, where each token's document starts, and a mask without labels of the next."""
        lengths = np.array([stop - first for _, first, stop in self._parts(idx)])
        starts = torch.from_numpy(np.repeat(np.cumsum(lengths) - lengths, lengths))
        length = len(sample["tokens"])
        return {
            "position_ids": torch.arange(length) - starts[:length],
            "document_starts": starts[:length],
            "loss_mask": sample["loss_mask"] * (starts[1:] == starts[:length]),
        }

    def _name_first_bad_id(self, idx: int) -> str:
        ids, documents, *_ = self._query_document_sample_shuffle_indices(idx)
        where = np.flatnonzero((ids < 0) | (ids >= self._num_ids))[0]
        left, start = where, self.sample_index[self.shuffle_index[idx]][1]  # offset in the first document
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
        """Read the order from the cache. The first reader, by Megatron's builder always rank 0, creates it."""
        stem = Path(str(self.config.path_to_cache), f"{self.unique_description_hash}-{self.index_split.name}")
        files = [stem.with_name(f"{stem.name}-{name}.npy") for name in ("documents", "samples", "shuffle")]
        if not all(file.is_file() for file in files):
            stem.parent.mkdir(parents=True, exist_ok=True)
            for file, index in zip(files, self._build_order(), strict=True):
                np.save(file, index)
        documents, samples, shuffle = (_map(file) for file in files)
        return documents, samples, shuffle

    def _build_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the documents of all passes, the bounds of the samples in them, and the order of the samples.

        Each pass shuffles its documents, then its samples. A sample that reaches into the next pass belongs to the next
        pass. So a further pass changes nothing before it, and a single pass is in Megatron's own order.

        Returns:
            Documents int32 [passes * documents]; (position in it, offset) where each sample begins, and where the last
            one ends [samples + 1, 2]; samples [samples].
        """
        assert self.num_samples is not None, "build_datasets passes a number"
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
    """Return the training and validation samples of a run, shuffled by `training.data_seed`, else `training.seed`.

    Samples repeat in passes as needed. Their order depends on the seed, the files and the sequence length, but not on
    the layout or the number of samples. Collective if torch.distributed is initialised: rank 0 builds the index cache,
    the others read it.

    Args:
        data: token files, blends, split, sequence length.
        training: has the seed.
        cache_dir: index cache, shared by all ranks. Each set of files and options has its own folder in it.
        num_train_samples: minimum number of samples (sequences) in the training set.
        num_valid_samples: the same for validation; with 0 none is built.
        vocab_size: number of ids of the model, without padding.

    Returns:
        Two datasets whose items are dicts of tokens, labels, loss_mask and position_ids, each [sequence_length].

    Raises:
        ValueError: for bad token files, weights or split, or a split without any text.
        OSError: if the index cache cannot be written.
    """
    check_token_files(data)
    seed = training.seed if training.data_seed is None else training.data_seed
    blends = [_blend("data.train", data.train), _blend("data.valid", data.valid) if data.valid else None, None]
    sizes = [num_train_samples, num_valid_samples, 0]
    key = _cache_key([ORDER, blends, data.split, seed, data.sequence_length, sizes], blends)
    path, final = _cache_path(Path(cache_dir), key)
    common = {"random_seed": seed, "path_to_cache": str(path), "num_ids": vocab_size}
    common |= {"loss_on": data.loss_on, "reset_at_documents": data.reset_at_documents}
    config = _dataset_config(data, blends, num_valid_samples, **common)
    built = _build(sizes, config, path)
    _publish(path, final)
    train, valid = built[Split.train.value], built[Split.valid.value]
    assert train is not None and (valid is not None or not num_valid_samples), "Megatron built no dataset"
    return train, valid


def _dataset_config(
    data: DataConfig, blends: list[Blend | None], num_valid_samples: int, **common: Any
) -> _DatasetConfig:
    """Return Megatron's config of the datasets; without `data.valid`, its split of the training files."""
    common |= {
        "sequence_length": data.sequence_length,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mmap_bin_files": False,  # they are read as WatchedFile
        "tokenizer": _NoTokenizer(),
    }
    if data.valid:
        blends = [blends[0], blends[1] if num_valid_samples else None, None]
        return _DatasetConfig(blend_per_split=blends, **common)
    _check_split(data.split)
    config = _DatasetConfig(blend=blends[0], split=data.split, **common)
    assert config.split_matrix is not None, "Megatron computes it from split"
    train_bounds, valid_bounds, _ = config.split_matrix
    _check_not_empty(data, "training", train_bounds)
    if num_valid_samples:
        _check_not_empty(data, "validation", valid_bounds)
    config.split_matrix = [train_bounds, valid_bounds if num_valid_samples else None, None]  # pyright: ignore
    return config


def _build(sizes: list[int], config: _DatasetConfig, path: Path) -> list[Any]:
    """Run Megatron's builder, which turns a disk error on rank 0 into advice about its own options."""
    try:
        built = BlendedMegatronDatasetBuilder(WatchedGPTDataset, sizes, lambda: True, config).build()
        for file in path.glob("*.npy"):  # those of a blend
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
    """Map an array that `np.save` wrote, which does not report a last block that did not fit on the disk."""
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise OSError(f"{file} was cut short ({error})") from error


def _blend(field: str, values: list[str]) -> Blend:
    """Return the blend, weighted by tokens if it has no weights, since Megatron would end it after one epoch."""
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
    """Refuse a split without tokens, over which Megatron would loop forever."""
    for prefix in parse_blend("data.train", data.train)[0]:
        lengths = document_lengths(prefix)
        first, last = (round(end * float(len(lengths))) for end in bounds or (0.0, 0.0))  # as Megatron rounds
        if not lengths[first:last].sum(dtype=np.int64):
            raise ValueError(
                f'data.split = "{data.split}" leaves nothing of the {len(lengths)} documents of {prefix} for '
                f"{name}: change data.split, prepare more documents, or set data.valid"
            )


def _cache_key(options: list, blends: list[Blend | None]) -> str:
    """Return a key that a rewritten file changes. Megatron's own keys hold only paths, so its order would be stale."""
    files = [Path(prefix + suffix) for blend in blends if blend for prefix in blend[0] for suffix in (".idx", ".bin")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()[:16]


def _cache_path(cache_dir: Path, key: str) -> tuple[Path, Path]:
    """Return where to build or read the cache, and its final place. It is built aside, so it is whole or absent."""
    final = cache_dir / key
    path = final if final.is_dir() else cache_dir / f"{key}.{uuid.uuid4().hex}.tmp"
    if torch.distributed.is_initialized():
        chosen = [str(path)]
        torch.distributed.broadcast_object_list(chosen, src=0)
        path = Path(chosen[0])
    return path, final


def _publish(path: Path, final: Path) -> None:
    """Move a cache that all ranks have opened to its final place; mapped files stay mapped."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if path != final and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        try:
            os.rename(path, final)
        except OSError:  # another run was first; ours stays mapped where it is
            pass

"""The datasets of a run: token files, blends and splits, built by Megatron with our dataset of each part."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.spliced import DatasetConfig, NoTokenizer, map_array
from distill_nemo.data.token_dataset import TokenDataset, open_windows
from distill_nemo.data.token_files import (
    Blend,
    document_lengths,
    documents_apart,
    named_corpora,
    parse_blend,
    to_number,
)
from distill_nemo.data.windows import Windows
from distill_nemo.fields import require
from distill_nemo.runtime.checksums import SUMS, sha256
from distill_nemo.runtime.files import fsync, write_atomically
from distill_nemo.runtime.host_memory import available_memory
from distill_nemo.teacher_store.codecs.codec import Field

ORDER_BYTES = 24  # of a sample's place and of its number, while the order is built
TOKEN_BYTES = 56  # of a token, its label, position and mask, in a sample and in the batch that it is copied into
ORDER = "pass by pass"  # order of the samples, part of the cache's key
OpenWindows = dict[str, Windows | None]  # by prefix; None for documents to be spliced


def build_datasets(
    data: DataConfig,
    training: TrainingConfig,
    cache_dir: Path,
    num_train_samples: int,
    num_valid_samples: int,
    vocab_size: int,
    targets: dict[str, Field] | None = None,
    cache_field: str = "data.cache",
) -> tuple[Dataset, Dataset | None]:
    """Return the training and validation samples of a run, shuffled by `training.data_seed`, else `training.seed`.

    Samples repeat in passes as needed. Their order depends on the seed, the files and the sequence length, but not on
    the layout or the number of samples. Collective if torch.distributed is initialised: rank 0 builds the index cache,
    the others read it.

    Args:
        data: token files, blends, split, sequence length; `check_corpora` has accepted them, on one rank for all.
        training: has the seed.
        cache_dir: index cache, shared by all ranks. Each set of files and options has its own folder in it.
        num_train_samples: minimum number of samples (sequences) in the training set.
        num_valid_samples: the same for validation; with 0 none is built.
        vocab_size: number of ids of the model, without padding.
        targets: a teacher's targets to read from stores, by name; None: this rank needs none.
        cache_field: field of the command that decides `cache_dir`, for errors.

    Returns:
        Two datasets whose items are dicts of tokens, labels, loss_mask and position_ids, each [sequence_length]; with
        `documents_apart` also of document_starts; with `targets` also of those, `target_<name>` [sequence_length, ...].

    Raises:
        ValueError: for bad weights or split, or a split without any text.
        OSError: if the index cache cannot be written.
    """
    seed = training.seed if training.data_seed is None else training.data_seed
    windows = {prefix: open_windows(prefix, data.loss_on) for _, prefix in named_corpora(data)}
    blends = [_blend("data.train", data.train), _blend("data.valid", data.valid) if data.valid else None, None]
    sizes = [num_train_samples, num_valid_samples, 0]
    key = _cache_key([ORDER, blends, data.split, seed, data.sequence_length, sizes], blends, windows)
    path, final = _cache_path(Path(cache_dir), key)
    common = {"random_seed": seed, "path_to_cache": str(path), "num_ids": vocab_size}
    common |= {"loss_on": data.loss_on, "reset_at_documents": data.reset_at_documents}
    common |= {"documents_apart": documents_apart(data), "targets": targets}
    config = _dataset_config(data, blends, windows, num_valid_samples, **common)
    built = _build(sizes, config, path, cache_field)
    _publish(path, final)
    train, valid = built[Split.train.value], built[Split.valid.value]
    assert train is not None and (valid is not None or not num_valid_samples), "Megatron built no dataset"
    return train, valid


def check_number_of_samples(stated: str, number: int) -> None:
    """Refuse more samples than this host's memory holds the order of. Call it on rank 0, which builds the order.

    Args:
        stated: fields and values that the number follows from.
        number: of samples.

    Raises:
        ValueError: with the bytes that are needed, and those that there are.
    """
    needed, free = number * ORDER_BYTES, available_memory()
    require(
        needed <= free,
        f"{stated}: the order of {number:,} samples takes {needed / 2**30:,.0f} GiB of memory, and this host has "
        f"{free / 2**30:,.0f} GiB left; state fewer",
    )


def check_micro_batch(field: str, number: int, sequence_length: int) -> None:
    """Refuse a micro batch that this host's memory cannot hold, before its samples are read.

    Args:
        field: that states the number.
        number: of samples.
        sequence_length: their tokens.

    Raises:
        ValueError: with the bytes that are needed, and those that there are.
    """
    needed, free = number * sequence_length * TOKEN_BYTES, available_memory()
    require(
        needed <= free,
        f"{field} = {number}: so many samples of {sequence_length:,} tokens take {needed / 2**30:,.0f} GiB of memory, "
        f"and this host has {free / 2**30:,.0f} GiB left; state fewer",
    )


def samples_of_a_pass(data: DataConfig) -> int:
    """Return the number of whole samples in all of `data.train`, of files that `check_corpora` accepts.

    Raises:
        ValueError: if there is none.
    """
    prefixes, _ = parse_blend("data.train", data.train)
    _check_split(data.split)
    weights = [float(part) for part in data.split.split(",")]
    share, found = weights[0] / sum(weights), 0
    for prefix in prefixes:
        windows = open_windows(prefix, data.loss_on)
        sizes = document_lengths(prefix) if windows is None else np.full(len(windows), data.sequence_length)
        tokens = int(sizes[: round(share * len(sizes))].sum(dtype=np.int64))
        found += max(tokens - (windows is None), 0) // data.sequence_length  # the last token of documents is a label
    if not found:
        where = f'the first share of data.split = "{data.split}"' if share < 1 else "data.train"
        raise ValueError(f"{where} holds no whole sample of {data.sequence_length} tokens: prepare more text")
    return found


def check_held_out(data: DataConfig) -> None:
    """Refuse data without validation text, of files that `check_corpora` accepts.

    Raises:
        ValueError: with the ways to have some.
    """
    if data.valid:
        return
    _check_split(data.split)
    shares = [*map(float, data.split.split(",")), 0.0]
    bounds = shares[0] / sum(shares), (shares[0] + shares[1]) / sum(shares)
    windows = {prefix: open_windows(prefix, data.loss_on) for _, prefix in named_corpora(data)}
    _check_not_empty(data, windows, "validation", bounds)


def _dataset_config(
    data: DataConfig, blends: list[Blend | None], windows: OpenWindows, num_valid_samples: int, **common: Any
) -> DatasetConfig:
    """Return Megatron's config of the datasets; without `data.valid`, its split of the training files."""
    common |= {
        "sequence_length": data.sequence_length,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mmap_bin_files": False,  # they are read as WatchedFile
        "tokenizer": NoTokenizer(),
    }
    if data.valid:
        blends = [blends[0], blends[1] if num_valid_samples else None, None]
        return DatasetConfig(blend_per_split=blends, **common)
    _check_split(data.split)
    config = DatasetConfig(blend=blends[0], split=data.split, **common)
    assert config.split_matrix is not None, "Megatron computes it from split"
    train_bounds, valid_bounds, _ = config.split_matrix
    _check_not_empty(data, windows, "training", train_bounds)
    if num_valid_samples:
        _check_not_empty(data, windows, "validation", valid_bounds)
    config.split_matrix = [train_bounds, valid_bounds if num_valid_samples else None, None]  # pyright: ignore
    return config


def _build(sizes: list[int], config: DatasetConfig, path: Path, cache_field: str) -> list[Any]:
    """Run Megatron's builder, which turns a disk error on rank 0 into advice about its own options."""
    try:
        built = BlendedMegatronDatasetBuilder(TokenDataset, sizes, lambda: True, config).build()
        for file in path.glob("*.npy"):  # those of a blend
            map_array(file)
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
            f"free): {cause}. Free space, or name a directory on another disk: {cache_field}"
        ) from error


def _blend(field: str, values: list[str]) -> Blend:
    """Return the blend, weighted by tokens if it has no weights, since Megatron would end it after one epoch."""
    prefixes, weights = parse_blend(field, values)
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(corpus_at(prefix).pass_tokens()) for prefix in prefixes]


def _check_split(split: str) -> None:
    weights = [to_number(part) for part in split.split(",")]
    good = [weight for weight in weights if weight is not None and math.isfinite(weight) and weight >= 0]
    if not 1 <= len(weights) <= 3 or len(good) != len(weights) or not sum(good):
        raise ValueError(f'data.split must be weights of train,valid,test such as "969,30,1", got "{split}"')


def _check_not_empty(data: DataConfig, windows: OpenWindows, name: str, bounds: tuple[float, float] | None) -> None:
    """Refuse a split without tokens, over which Megatron would loop forever."""
    for prefix in parse_blend("data.train", data.train)[0]:
        cut = windows[prefix]
        lengths = document_lengths(prefix) if cut is None else np.ones(len(cut), np.int32)
        first, last = (round(end * float(len(lengths))) for end in bounds or (0.0, 0.0))  # as Megatron rounds
        if not lengths[first:last].sum(dtype=np.int64):
            what = "documents" if cut is None else "samples"
            raise ValueError(
                f'data.split = "{data.split}" leaves nothing of the {len(lengths)} {what} of {prefix} for {name}: '
                "change data.split, prepare more documents, or set data.valid"
            )


def _cache_key(options: list, blends: list[Blend | None], windows: OpenWindows) -> str:
    """Return a key that a rewritten file changes. Megatron's own keys hold only paths, so its order would be stale."""
    files: list[Path] = []
    for prefix in (prefix for blend in blends if blend for prefix in blend[0]):
        cut = windows[prefix]
        files += [Path(f"{prefix}.idx"), Path(f"{prefix}.bin")] if cut is None else cut.files
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()[:16]


def _cache_path(cache_dir: Path, key: str) -> tuple[Path, Path]:
    """Return where to build or read the cache, and its final place. It is built aside, so it is whole or absent.

    One that is not as it was written, as after a power loss, is removed: its order would be another, without a word.
    """
    final = cache_dir / key
    chosen = [""]
    if _is_first():
        whole = _is_whole(final)
        if final.is_dir() and not whole:
            print(f"the index cache {final} is not whole: it is built again", flush=True)
            shutil.rmtree(final, ignore_errors=True)
        chosen = [str(final if whole else cache_dir / f"{key}.{uuid.uuid4().hex}.tmp")]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0]), final


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _is_whole(cache: Path) -> bool:
    """Return True if the files of a cache are those that its sums name."""
    try:
        return (cache / SUMS).read_text(encoding="utf-8") == _sums(cache)
    except (OSError, UnicodeDecodeError):
        return False


def _sums(cache: Path) -> str:
    files = sorted(file for file in cache.iterdir() if file.name != SUMS)
    return "".join(f"{sha256(file)}  {file.name}\n" for file in files)


def _publish(path: Path, final: Path) -> None:
    """Move a cache that all ranks have opened to its final place; mapped files stay mapped."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if path != final and _is_first():
        with contextlib.suppress(OSError):  # another run was first, or no room; ours stays mapped where it is
            write_atomically(path / SUMS, _sums(path))
            for file in path.iterdir():
                fsync(file)
            os.rename(path, final)

"""Megatron's GPT datasets over token files, and the checks that must come before Megatron maps them."""

import hashlib
import json
import math
import os
import struct
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.manifest import max_token_id, read_manifest

INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
MAGIC = b"MMIDIDX\x00\x00"
ADVICE = "make the token files again with `nemo distill prepare`"
OWN_TOKENIZER = "prepare the text again with the model's own tokenizer"
Blend = tuple[list[str], list[float] | None]


class WatchedGPTDataset(GPTDataset):
    """Megatron's, which would die of SIGBUS where a file was cut short after it was mapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokens: Any = self.dataset
        prefix = tokens.path_prefix
        self._sizes = {path: os.stat(path).st_size for path in (f"{prefix}.bin", f"{prefix}.idx")}

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """One sample.

        Raises:
            ValueError: when a token file of it is shorter than when the run began.
            FileNotFoundError: when one is gone.
        """
        for path, size in self._sizes.items():
            if (now := os.stat(path).st_size) < size:
                raise ValueError(
                    f"{path} has {now} bytes now, and had {size} when this run began: put it back as it was, and the "
                    "same command goes on from the last checkpoint"
                )
        return super().__getitem__(idx)


class _NoTokenizer:
    """Megatron wants a tokenizer for masks that are switched off here; -1 is its own "no padding" id."""

    eod = None
    pad = -1
    vocab_size = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def parse_blend(field: str, values: list[str]) -> Blend:
    """`["a"]`, `["a", "b"]` or `["30", "a", "70", "b"]` -> (prefixes, weights or None).

    Raises:
        ValueError: nothing named, weights for some prefixes only, or a weight that is not positive and finite.
    """
    numbers = [_number(value) for value in values]
    prefixes, weights = values[1::2], numbers[0::2]
    if not any(number is not None for number in numbers):
        prefixes, weights = values, None
    shape = f'{field} must be ["a"], ["a", "b"] or ["30", "a", "70", "b"] (weight, prefix, ...), got {values}'
    if not values or (weights is not None and (len(values) % 2 or None in weights)):
        raise ValueError(shape)
    if weights is None:
        return list(prefixes), None
    checked = [weight for weight in weights if weight is not None and math.isfinite(weight) and weight > 0]
    if len(checked) != len(weights):
        raise ValueError(f"{field}: every weight must be a positive number, got {values[0::2]}")
    return list(prefixes), checked


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def check_token_files(data: DataConfig) -> None:
    """Refuse token files that are missing, empty or cut short, before Megatron maps them and reads beyond the end.

    Raises:
        ValueError: naming the file, the sizes, and what to do.
    """
    for field, values in (("data.train", data.train), ("data.valid", data.valid)):
        for prefix in parse_blend(field, values)[0] if values or field == "data.train" else []:
            _read_lengths(field, prefix)


def _read_lengths(field: str, prefix: str) -> np.ndarray:
    """Tokens of every document, int32 [documents], from an index whose `.bin` has the size it promises."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise ValueError(f"{field}: no file {path}; {ADVICE}")
        if not path.stat().st_size:
            raise ValueError(f"{field}: {path} is empty (0 bytes); {ADVICE}")
    with open(idx, "rb") as file:
        head = file.read(INDEX_HEADER.size)
    magic, version, code, sequences, documents = INDEX_HEADER.unpack(head.ljust(INDEX_HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in set(DType._value2member_map_):
        raise ValueError(f"{field}: {idx} is not a Megatron index; {ADVICE}")
    expected = INDEX_HEADER.size + sequences * 12 + documents * 8
    _same_size(field, idx, expected, f"its header promises {sequences} documents")
    if not sequences:
        raise ValueError(f"{field}: {idx} holds no documents; {ADVICE}")
    lengths = np.memmap(idx, np.int32, "r", INDEX_HEADER.size, (sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    _same_size(field, bin_, tokens * DType.size(code), f"{idx} promises {tokens} tokens")
    return lengths


def _same_size(field: str, path: Path, expected: int, why: str) -> None:
    actual = path.stat().st_size
    if actual != expected:
        what = "truncated" if actual < expected else "too long"
        raise ValueError(f"{field}: {path} is {what}: {actual} bytes instead of {expected} ({why}); {ADVICE}")


def check_vocabulary(data: DataConfig, vocab_size: int) -> None:
    """Refuse token files that hold an id that the model lacks, as far as their manifests tell.

    Token files without our manifest, and what a manifest leaves out, are checked where samples are read.

    Raises:
        ValueError: naming the file, its largest id and the model's size.
    """
    for field, values in (("data.train", data.train), ("data.valid", data.valid)):
        for prefix in parse_blend(field, values)[0] if values else []:
            manifest = read_manifest(prefix)
            largest = max_token_id(manifest)
            if largest is not None and largest >= vocab_size:
                raise ValueError(
                    f"{field}: {prefix}.bin holds the token id {largest} (made with {manifest.get('tokenizer')}), but "
                    f"the model's vocab_size is {vocab_size}: {OWN_TOKENIZER}"
                )


def build_datasets(
    data: DataConfig, training: TrainingConfig, cache_dir: Path, num_train_samples: int, num_valid_samples: int
) -> tuple[Dataset, Dataset | None]:
    """The training and validation samples of a run, shuffled by `training.data_seed` (default `training.seed`).

    Samples repeat in epochs as needed. The order depends on the seed, the files and the numbers of samples, not on
    the layout. Collective when torch.distributed is initialised: rank 0 builds the index cache, the others read it.

    Args:
        data: token files, blends, split, sequence length.
        training: for the seed.
        cache_dir: index cache, shared by all ranks. Each set of files and options has its own folder in it.
        num_train_samples: at least so many samples (sequences) are in the training set.
        num_valid_samples: the same for validation; with 0 none is built.

    Returns:
        Two datasets whose items are dicts of tokens, labels, loss_mask and position_ids, each [sequence_length].

    Raises:
        ValueError: bad token files, weights or split, or a split without any text.
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
    }
    sizes = [num_train_samples, num_valid_samples, 0]
    key = _cache_key([blends, data.split, seed, data.sequence_length, sizes], blends)
    path, final = _cache_path(Path(cache_dir), key)
    if data.valid:
        blends[1] = blends[1] if num_valid_samples else None
        config = GPTDatasetConfig(blend_per_split=blends, path_to_cache=str(path), **common)
    else:
        _check_split(data.split)
        config = GPTDatasetConfig(blend=blends[0], split=data.split, path_to_cache=str(path), **common)
        assert config.split_matrix is not None, "Megatron computes it from split"
        train_bounds, valid_bounds, _ = config.split_matrix
        _check_not_empty(data, "training", train_bounds)
        if num_valid_samples:
            _check_not_empty(data, "validation", valid_bounds)
        config.split_matrix = [train_bounds, valid_bounds if num_valid_samples else None, None]  # pyright: ignore
    built = BlendedMegatronDatasetBuilder(WatchedGPTDataset, sizes, lambda: True, config).build()
    _publish(path, final)
    train, valid = built[Split.train.value], built[Split.valid.value]
    assert train is not None and (valid is not None or not num_valid_samples), "Megatron built no dataset"
    return train, valid


def _blend(field: str, values: list[str]) -> Blend:
    """Without weights, files are weighted by their tokens: Megatron would stop such a blend after one epoch."""
    prefixes, weights = parse_blend(field, values)
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(_read_lengths(field, p).sum(dtype=np.int64)) for p in prefixes]


def _check_split(split: str) -> None:
    weights = [_number(part) for part in split.split(",")]
    good = [weight for weight in weights if weight is not None and math.isfinite(weight) and weight >= 0]
    if not 1 <= len(weights) <= 3 or len(good) != len(weights) or not sum(good):
        raise ValueError(f'data.split must be weights of train,valid,test such as "969,30,1", got "{split}"')


def _check_not_empty(data: DataConfig, name: str, bounds: tuple[float, float] | None) -> None:
    """Refuse a split without tokens: Megatron would count its epochs for ever."""
    for prefix in parse_blend("data.train", data.train)[0]:
        lengths = _read_lengths("data.train", prefix)
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

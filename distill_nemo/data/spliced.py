"""Documents spliced one after another, cut into samples by Megatron's GPT dataset, in our order."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.token_masks import TokenMask, mask_of
from distill_nemo.data.windows import inside_documents
from distill_nemo.runtime.watched_file import WatchedFile
from distill_nemo.teacher_store.codecs.codec import Field


class NoTokenizer:
    """Stand-in for the tokenizer that Megatron needs for masks, which are off here. `pad` is cut out of samples."""

    eod = None
    pad = -(2**63)  # occurs in no token file
    vocab_size = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron's fields and ours."""

    num_ids: int = 0  # of the model, without padding
    loss_on: LossOn | None = None  # see DataConfig
    reset_at_documents: bool = False
    documents_apart: bool = False  # in some part of the data
    targets: dict[str, Field] | None = None  # of every sample, see `build_datasets`


class SplicedDocuments(GPTDataset):
    """Megatron's dataset with three differences.

    - The order of samples does not depend on their number. Megatron shuffles all passes over the data together.
    - Tokens that a mask beside the token files leaves out do not count as labels.
    - A file that becomes shorter is refused. Megatron maps it, and would be killed by SIGBUS.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        assert isinstance(config, DatasetConfig)
        self._prefix = str(self.dataset_path)
        self._documents_apart = config.reset_at_documents
        files = [f"{self._prefix}{suffix}" for suffix in (".bin", ".idx", ".mask")]
        self._watched = [WatchedFile(path) for path in files if os.path.exists(path)]
        self._files.bin_reader = self._watched[0]  # pyright: ignore[reportAttributeAccessIssue]
        self._mask = mask_of(self._prefix, config.loss_on)

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
            ValueError: if a token file is shorter than when the run began.
            FileNotFoundError: if a token file is gone.
        """
        for file in self._watched:
            file.check()
        sample = super().__getitem__(idx)
        if self._mask is not None and idx is not None:
            sample["loss_mask"] = sample["loss_mask"] * self._label_mask(self._mask, idx)  # Megatron's is shared
        if self._documents_apart:
            apart = inside_documents(np.array([stop - first for _, first, stop in self._parts(idx or 0)]))
            sample |= apart | {"loss_mask": sample["loss_mask"] * apart["loss_mask"]}
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

    def place(self, idx: int, position: int) -> str:
        """Return the name of a token of a sample, for errors."""
        left = position
        for document, first, stop in self._parts(idx):
            if left < stop - first:
                return f"{self._prefix}.bin: token {first + left} of document {document} (both from 0)"
            left -= stop - first
        raise AssertionError(f"sample {idx} has no token {position}")

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the order from the cache."""
        stem = f"{self.unique_description_hash}-{self.index_split.name}"
        names = ("documents", "samples", "shuffle")
        documents, samples, shuffle = cached(Path(str(self.config.path_to_cache), stem), names, self._build_order)
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


def cached(stem: Path, names: tuple[str, ...], build: Callable[[], tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Map the arrays `<stem>-<name>.npy`. The first caller, by Megatron's builder always rank 0, builds them."""
    files = [stem.with_name(f"{stem.name}-{name}.npy") for name in names]
    if not all(file.is_file() for file in files):
        stem.parent.mkdir(parents=True, exist_ok=True)
        for file, index in zip(files, build(), strict=True):
            np.save(file, index)
    return [map_array(file) for file in files]


def map_array(file: Path) -> np.ndarray:
    """Map an array that `np.save` wrote, which does not report a last block that did not fit on the disk."""
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise OSError(f"{file} was cut short ({error})") from error

"""Samples of one part of a blend: spliced documents, or windows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from torch import Tensor

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.manifest import pack_length
from distill_nemo.data.packs import Packs
from distill_nemo.data.spliced import DatasetConfig, SplicedDocuments, cached
from distill_nemo.data.stored_windows import StoredWindows, empty_targets
from distill_nemo.data.token_files import OWN_TOKENIZER
from distill_nemo.data.windows import WindowPasses, Windows, order_of_windows
from distill_nemo.teacher_store.manifest import is_store


class TokenDataset(MegatronDataset):
    """One part of a blend, which Megatron requires to be of one class. An id that the model lacks is refused.

    The host can name file, document and token of such an id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the samples, or read their order from the cache. Takes Megatron's arguments."""
        super().__init__(*args, **kwargs)
        config = self.config
        assert isinstance(config, DatasetConfig)
        self._num_ids, self._documents_apart, self._targets = config.num_ids, config.documents_apart, config.targets
        self._samples = (
            WindowPasses(self.dataset, self._order())
            if isinstance(self.dataset, Windows)
            else SplicedDocuments(*args, **kwargs)
        )

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """Open what lies at a path."""
        windows = open_windows(dataset_path, config.loss_on, with_targets=config.targets is not None)
        return GPTDataset.build_low_level_dataset(dataset_path, config) if windows is None else windows

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Return the number of windows or documents, which `data.split` divides."""
        if isinstance(low_level_dataset, Windows):
            return len(low_level_dataset)
        assert isinstance(low_level_dataset, IndexedDataset)
        return GPTDataset.numel_low_level_dataset(low_level_dataset)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Return a sample. If any part of the data keeps documents apart, all samples have document_starts.

        If targets are read, a sample that comes from no store has empty ones.

        Raises:
            ValueError: if it holds an id that the model lacks, or a file is shorter than when the run began.
            FileNotFoundError: if a file is gone.
        """
        sample = self._samples[idx]
        for name in ("tokens", "labels"):
            ids = sample[name].numpy()
            if ids.min() < 0 or ids.max() >= self._num_ids:
                raise ValueError(self._name_first_bad_id(sample, idx))
        if self._documents_apart and "document_starts" not in sample:
            sample["document_starts"] = torch.zeros_like(sample["tokens"])
        if self._targets is not None:
            sample = empty_targets(self._targets, len(sample["tokens"])) | sample
        return sample

    def _name_first_bad_id(self, sample: dict[str, Tensor], idx: int) -> str:
        ids = np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1])
        position = int(np.flatnonzero((ids < 0) | (ids >= self._num_ids))[0])
        return (
            f"{self._samples.place(idx, position)} is the id {ids[position]}, but the model has the ids 0 to "
            f"{self._num_ids - 1}: {OWN_TOKENIZER}"
        )

    def _order(self) -> np.ndarray:
        stem = Path(str(self.config.path_to_cache), f"{self.unique_description_hash}-{self.index_split.name}")
        assert self.num_samples is not None, "build_datasets passes a number"
        ordered = (order_of_windows(self.indices, self.num_samples, self.config.random_seed),)
        return cached(stem, ("windows",), lambda: ordered)[0]


def open_windows(path: str, loss_on: LossOn | None, with_targets: bool = False) -> Windows | None:
    """Return the windows at a path; None if documents lie there, to be spliced."""
    if is_store(path):
        return StoredWindows(path, with_targets)
    length = pack_length(path)
    return None if length is None else Packs(path, length, loss_on)

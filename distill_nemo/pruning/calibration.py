"""Calibration and held-out samples, and the passes of a model over them."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from distill_nemo.config import DataConfig, PruneConfig, TrainingConfig
from distill_nemo.data.datasets import build_datasets
from distill_nemo.data.manifest import pack_length
from distill_nemo.evaluation import evaluate_samples
from distill_nemo.models.architecture import Architecture
from distill_nemo.pruning.choice import Scores
from distill_nemo.pruning.importance import watching, without_layer
from distill_nemo.runtime.process_groups import rank


def data_config(config: PruneConfig) -> DataConfig:
    """Return the token files as a run states them."""
    return DataConfig(train=[config.data], split=config.split, sequence_length=config.sequence_length)


def with_sample_length(config: PruneConfig) -> PruneConfig:
    """Return the config with the length of its packs, if the data is packed: no other samples can be cut from it."""
    return replace(config, sequence_length=pack_length(config.data) or config.sequence_length)


@dataclass(frozen=True)
class Calibration:
    """The first samples of the data, which scores come from, and the next ones, which losses come from."""

    samples: Any  # dataset
    num_samples: int
    num_held_out: int
    sequence_length: int

    @classmethod
    def of(cls, config: PruneConfig, vocab_size: int, cache: Path) -> "Calibration":
        """Build the samples. Collective."""
        count = config.samples + config.held_out_samples
        samples, _ = build_datasets(data_config(config), TrainingConfig(), cache, count, 0, vocab_size, None, "output")
        return cls(samples, config.samples, config.held_out_samples, config.sequence_length)

    def tokens_sha256(self) -> str:
        """Return a hash of all tokens, in order."""
        digest = hashlib.sha256()
        for i in range(self.num_samples + self.num_held_out):
            digest.update(self.samples[i]["tokens"].numpy().tobytes())
        return digest.hexdigest()

    def scores(self, chunk: GPTModel, model: Architecture) -> Scores | None:
        """Return the scores on rank 0, None on other ranks. Collective."""
        with watching(chunk, model) as sums:
            self._lm_loss(chunk, 0, self.num_samples)
        return sums.gathered()

    def held_out_loss(self, chunk: GPTModel) -> float:
        """Return the LM loss over the held-out samples, the same on every rank. Collective."""
        return self._lm_loss(chunk, self.num_samples, self.num_held_out)

    def losses_without_a_layer(self, chunk: GPTModel, num_layers: int) -> list[float]:
        """Return the held-out loss without each of the layers. Collective."""
        losses = []
        for number in range(num_layers):
            with without_layer(chunk, number):
                losses.append(self.held_out_loss(chunk))
            if rank() == 0:
                print(f"without layer {number}: held-out LM loss {losses[-1]:.4f}", flush=True)
        return losses

    def _lm_loss(self, chunk: GPTModel, first: int, count: int) -> float:
        return evaluate_samples(chunk, self.samples, first, count, self.sequence_length)["lm_loss"]

"""`nemo distill prune`: score, choose, cut, check, publish. Every rank calls it."""

import contextlib
import gc
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from distill_nemo.checks import check_prune
from distill_nemo.config import ParallelismConfig, PruneConfig, StudentConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.datasets import samples_of_a_pass
from distill_nemo.data.token_files import check_vocabulary, documents_apart
from distill_nemo.fields import fields_named, require
from distill_nemo.hub import recorded_name
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.huggingface import check_export, check_target, writing_export
from distill_nemo.models.checkpoints.local_parameters import local_parameters
from distill_nemo.models.checkpoints.tensor_files import DTYPES
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.provider import model_provider
from distill_nemo.models.resolve import resolve
from distill_nemo.models.source_check import refusal_of_sources
from distill_nemo.pruning.calibration import Calibration, data_config, with_sample_length
from distill_nemo.pruning.choice import Kept, Scores, choose, highest, kept_layers
from distill_nemo.pruning.possible import files_of, possible_sizes
from distill_nemo.pruning.progress import PROGRESS, earlier_progress, write_progress
from distill_nemo.pruning.record import (
    RECORD,
    earlier_record,
    identity_of,
    kept_of,
    plain_scores,
    unfinished_record,
    write_record,
)
from distill_nemo.pruning.search import target_parameters
from distill_nemo.pruning.sizes import (
    Sizes,
    check_prunable,
    evenly_spaced,
    odd_widths,
    sizes_of,
    smaller,
    with_source,
)
from distill_nemo.pruning.tensors import CutTensors, write_cut
from distill_nemo.runtime.everyone import Everyone
from distill_nemo.runtime.process_groups import is_joined, process_groups, raise_everywhere, rank, world_size
from distill_nemo.runtime.seed import seed_everything
from distill_nemo.training.data import check_tokenizers
from distill_nemo.training.entry import check_length

CACHE = "index_cache"
AS_TYPED = {  # names of fields, by those of a run
    "data.train": "data",
    "data.split": "split",
    "data.sequence_length": "sequence_length",
    "student.checkpoint": "model",
}


def prune(config: PruneConfig) -> None:
    """Cut a model, and publish the result as a Hugging Face directory. Every rank calls it, after `setup_device`.

    A result of the same config, model and data stays as it is.

    Raises:
        ValueError: for sizes, data or a layout that do not fit the model, before anything is computed.
        RuntimeError: if transformers' logits of the result differ from ours.
    """
    check_prune(config, world_size())
    check_target(Path(config.output), config.model, config.data)
    config = with_sample_length(config)
    model = resolve(StudentConfig(checkpoint=config.model))
    check_prunable(model)
    parallelism = config.parallelism or ParallelismConfig()
    possible = possible_sizes(model, config, parallelism, partial(evenly_spaced, model))
    with fields_named(AS_TYPED):
        check_data(config, model)
    if warning := odd_widths(possible[0], model):
        _say(warning)
    files_of(model, torch.float32).check()  # the tokenizer too, before hours of scoring
    identity = identity_of(config, model, possible)
    refusal = refusal_of_sources(model) if rank() == 0 or is_joined() else None
    with process_groups(parallelism):
        raise_everywhere(refusal)
        seed_everything(0)
        everyone = Everyone()
        if everyone.on_rank_0(lambda: earlier_record(Path(config.output), identity)) is not None:
            _say(f"{config.output} is there already, cut from the same model by the same settings")
            return
        with contextlib.ExitStack() as aside:  # used on rank 0 only

            def begin() -> str:
                return str(aside.enter_context(writing_export(Path(config.output), RECORD)))

            directory = Path(everyone.on_rank_0(begin))
            calibration = Calibration.of(config, model.vocab_size, directory / CACHE)
            _Pruning(config, model, parallelism, identity, calibration, directory, everyone).run(possible)
            everyone.on_rank_0(aside.close)
    _say(f"published {config.output}")


def check_data(config: PruneConfig, model: Architecture) -> None:
    """Refuse token files that are missing, damaged, too few or of another vocabulary than the model's.

    Raises:
        ValueError: naming the file or the tokens.
    """
    data = data_config(config)
    check_length(config.sequence_length, "model", model, "sequence_length")
    corpus_at(config.data).check("data", data)
    check_vocabulary(data, model.vocab_size)
    check_tokenizers(data, {"student": config.model}, model)
    if documents_apart(data):
        model.with_documents_apart()
    stored, count = samples_of_a_pass(data), config.samples + config.held_out_samples
    require(
        count <= stored,
        f"samples = {config.samples} and held_out_samples = {config.held_out_samples}: {config.data} holds {stored:,} "
        f"samples of {config.sequence_length} tokens in all; state fewer, a shorter sequence_length, or more data",
    )


@dataclass(frozen=True)
class _Pruning:
    """One call of `prune` on a rank: what all its steps need."""

    config: PruneConfig
    model: Architecture
    parallelism: ParallelismConfig
    identity: str
    calibration: Calibration
    directory: Path
    everyone: Everyone

    def run(self, possible: list[Sizes]) -> None:
        """Write the result into the directory, and compare it with transformers."""
        earlier = self.everyone.on_rank_0(lambda: unfinished_record(self.directory, self.identity))
        if earlier is not None:
            _say("the scores of an interrupted call are used again")
        record = earlier or {"identity": self.identity, **self._chosen(possible)}
        sizes, kept = record["result"]["sizes"], kept_of(record["kept"])
        cut = self._cut(sizes, kept.layers)
        with CutTensors(self.model, cut, kept) as tensors:
            self.everyone.on_rank_0(lambda: self._begin(record, cut, tensors))
            write_cut(tensors, self.directory, self.everyone)
            chunk = self._built(cut, tensors)
        check_export([chunk], cut, self.directory, everyone=self.everyone)
        self.everyone.on_rank_0(self._remove_progress)
        _say(_summary(record))

    def _chosen(self, possible: list[Sizes]) -> dict[str, Any]:
        """Return the record of the cut with the lowest held-out loss."""
        scores, losses = self._scores()
        possible, tried = self._possible(possible, scores), []
        for number, sizes in enumerate(possible, 1):
            kept = kept_of(self.everyone.on_rank_0(lambda sizes=sizes: asdict(self._kept(scores, sizes))))
            if number == len(losses):
                losses.append(self._loss(sizes, kept))
                self._write_progress(scores, losses)
            tried.append((losses[number], sizes, kept))
            if len(possible) > 1:
                _say(f"candidate {number} of {len(possible)}: held-out LM loss {losses[number]:.4f} with {sizes}")
        loss, sizes, kept = min(tried, key=lambda each: each[0])
        return self._described(sizes, kept) | {
            "calibration": self._calibrated(),
            "held_out_lm_loss": {"model": round(losses[0], 4), "result": round(loss, 4)},
            "candidates": [{"sizes": each, "held_out_lm_loss": round(value, 4)} for value, each, _ in tried],
            "kept": asdict(kept),
            "scores": plain_scores(scores) if scores is not None else None,
        }

    def _scores(self) -> tuple[Scores | None, list[float]]:
        """Return the scores, on rank 0, and held-out losses: the source's, and those of candidates compared before."""
        earlier = earlier_progress(self.directory, self.identity) if rank() == 0 else None
        losses = self.everyone.on_rank_0(lambda: earlier[1] if earlier is not None else [])
        if losses:
            _say("the scores of an interrupted call are used again")
            return (earlier[0] if earlier is not None else None), losses
        _say(f"scoring with {self.config.samples} samples of {self.config.sequence_length} tokens")
        chunk = self._stage(self.model)
        scores = self.calibration.scores(chunk, self.model)
        before = self.calibration.held_out_loss(chunk)
        if self.config.layer_importance == "loss":
            without = self.calibration.losses_without_a_layer(chunk, self.model.num_layers)
            if scores is not None:
                scores.layers = torch.tensor(without, dtype=torch.float64) - before
        self._write_progress(scores, [before])
        return scores, [before]

    def _write_progress(self, scores: Scores | None, losses: list[float]) -> None:
        def write() -> None:
            assert scores is not None, "rank 0 has them"
            write_progress(self.directory, self.identity, scores, losses)

        self.everyone.on_rank_0(write)

    def _possible(self, possible: list[Sizes], scores: Scores | None) -> list[Sizes]:
        """Return the sizes to compare. Where layers differ in size, those that stay decide what meets a target."""
        if target_parameters(self.config) is None or len(set(self.model.layers)) == 1:
            return possible
        of_layers = torch.tensor(self.everyone.on_rank_0(lambda: scores.layers.tolist() if scores is not None else []))
        return possible_sizes(self.model, self.config, self.parallelism, partial(highest, of_layers))

    def _kept(self, scores: Scores | None, sizes: Sizes) -> Kept:
        assert scores is not None, "rank 0 has them"
        cut = smaller(self.model, sizes, kept_layers(scores, sizes["num_layers"]))
        return choose(scores, self.model, cut, sizes)

    def _loss(self, sizes: Sizes, kept: Kept) -> float:
        cut = self._cut(sizes, kept.layers)
        with CutTensors(self.model, cut, kept) as tensors:
            loss = self.calibration.held_out_loss(self._built(cut, tensors))
        gc.collect()
        return loss

    def _cut(self, sizes: Sizes, layers: list[int]) -> Architecture:
        """Return the result's architecture. Its source is that of the model, with the result's config.json."""
        cut = smaller(self.model, sizes, layers)
        return replace(with_source(self.model, cut, layers), name=self.config.output)

    def _stage(self, model: Architecture, load_weights: bool = True) -> GPTModel:
        """Return this rank's pipeline stage in fp32, in which no layout changes a choice."""
        apart = documents_apart(data_config(self.config))
        built = model_provider(
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
            student=model.with_documents_apart() if apart else model,
            parallelism=self.parallelism,
            load_weights=load_weights,
        )
        assert isinstance(built, GPTModel)
        return built.cuda()

    def _built(self, cut: Architecture, tensors: CutTensors) -> GPTModel:
        """Return this rank's pipeline stage of a result that is not written."""
        built = self._stage(cut, load_weights=False)
        for parameter in local_parameters(built, cut):
            parameter.fill(tensors.read)
        return built

    def _remove_progress(self) -> None:
        for folder in (CACHE, PROGRESS):
            shutil.rmtree(self.directory / folder)

    def _begin(self, record: dict[str, Any], cut: Architecture, tensors: CutTensors) -> None:
        """Write all but the weights. On rank 0."""
        if unfinished_record(self.directory, record["identity"]) is None:
            for file in self.directory.glob("*.safetensors"):
                file.unlink()  # of another cut
        files_of(cut, DTYPES[next(iter(tensors.entries.values())).dtype]).write(self.directory)
        write_record(self.directory, record)

    def _described(self, sizes: Sizes, kept: Kept) -> dict[str, Any]:
        cut = smaller(self.model, sizes, kept.layers)
        described = {"family": self.model.family, "num_parameters": num_parameters(self.model)}
        return {
            "model": {"path": recorded_name(self.config.model), **described, "sizes": sizes_of(self.model)},
            "result": {"num_parameters": num_parameters(cut), "sizes": sizes},
        }

    def _calibrated(self) -> dict[str, Any]:
        names = ("data", "samples", "held_out_samples", "sequence_length", "layer_importance")
        tokens_sha256 = self.everyone.on_rank_0(self.calibration.tokens_sha256)
        return {name: vars(self.config)[name] for name in names} | {"tokens_sha256": tokens_sha256}


def _summary(record: dict[str, Any]) -> str:
    before, after, loss = record["model"], record["result"], record["held_out_lm_loss"]
    cut = [f"{name} {before['sizes'][name]} -> {size}" for name, size in after["sizes"].items()]
    return (
        f"{before['num_parameters']:,} -> {after['num_parameters']:,} parameters; {', '.join(cut)}; layers "
        f"{record['kept']['layers']} stay\nheld-out LM loss {loss['model']:.4f} -> {loss['result']:.4f}: distil it next"
    )


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)

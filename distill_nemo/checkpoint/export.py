"""Export a trained student to a Hugging Face directory: at the end of a run from its ranks, or later a saved step."""

import gc
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distill_nemo.checkpoint.directory import read_record
from distill_nemo.checkpoint.hub_models import on_this_machine
from distill_nemo.checks import check_layout_without_training
from distill_nemo.config import CheckpointConfig, ExportConfig, ParallelismConfig, RunConfig, StudentConfig
from distill_nemo.config_files import from_dict
from distill_nemo.data.token_files import named_corpora
from distill_nemo.fields import require
from distill_nemo.hub import cached
from distill_nemo.models.sources import STEP, CheckpointKind, FoundCheckpoint, find_checkpoint
from distill_nemo.publishing.card import Distilled, model_card
from distill_nemo.publishing.facts import name_of
from distill_nemo.publishing.push import check_push, push_directory
from distill_nemo.quantization import ExportFormatName
from distill_nemo.runtime.everyone import Everyone
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.runtime.process_groups import is_joined, process_groups, raise_everywhere, rank, world_size

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.models.architecture import Architecture


def export_from_run(config: RunConfig, student: "Architecture", chunks: "list[GPTModel]") -> None:
    """Export the trained student from the ranks that hold it, and push it if asked. Every rank calls it.

    The optimizer is gone by then.

    Raises:
        RuntimeError: when the export failed; the checkpoint is whole, and the message says how to try again.
        PushError: when the push failed; the export is whole.
    """
    gc.collect()
    torch.cuda.empty_cache()
    source = _source(config.student.checkpoint) if rank() == 0 else None
    try:
        saved = config.checkpoint
        of_run = config, Path(config.output_dir), config.training.steps, saved.push_to, saved.quantized
        card = partial(_card, student, *of_run)
        tokenizer = config.data.tokenizer
        _export(chunks, str(_target(config)), student, tokenizer, source, saved, card)
    except (ValueError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"export failed; the checkpoint is whole: {error}. Run the same command again to export it, or on other "
            f"ranks: nemo distill export checkpoint={config.output_dir} output={_target(config)} run.executor=..."
        ) from error
    _report(f"step_{config.training.steps:08d}", str(_target(config)))
    if config.checkpoint.push_to is not None:
        Everyone().on_rank_0(partial(push_directory, config.checkpoint, _target(config)))


def _export(
    chunks: "list[GPTModel]",
    output: str,
    student: "Architecture",
    tokenizer: str | None,
    source: Path | None,
    config: CheckpointConfig | ExportConfig,
    card: Callable[[], str] | None,
) -> None:
    from distill_nemo.models.checkpoints.huggingface import export_hf

    copied, quantized = config.copy_untouched, config.quantized
    export_hf(chunks, output, student, tokenizer, source, copy_untouched=copied, quantized=quantized, card=card)


def _card(
    student: "Architecture",
    config: RunConfig,
    directory: Path,
    step: int | None,
    push_to: str | None,
    quantized: ExportFormatName,
) -> str:
    from distill_nemo.models.families.tensors import num_parameters

    title = push_to.partition("@")[0] if push_to else name_of(config.output_dir)
    return model_card(Distilled(config, directory, step, num_parameters(student), title, quantized))


def _report(exported: str, output: str) -> None:
    if rank() == 0:
        print(f"exported {exported} to {output}: the reloaded model gives the same logits", flush=True)


def prepare_export(config: RunConfig, student: "Architecture", dtype: torch.dtype) -> None:
    """Refuse a run whose export or push would fail, before its first step. Collective. Writes nothing on this machine.

    Raises:
        PushError: if the hub cannot be asked.
        ValueError: if transformers has no class for the student, refuses its sizes, or cannot open its tokenizer; or
            if the export's directory must not be replaced, or there is nothing to copy as `copy_untouched` asks; or if
            the hub would refuse the push.
    """
    from distill_nemo.data.tokenizer import load_tokenizer
    from distill_nemo.models.checkpoints.export_files import export_files, exported_tokenizer
    from distill_nemo.models.checkpoints.exportable import NO_EXPORT, check_exportable
    from distill_nemo.models.checkpoints.huggingface import check_target
    from distill_nemo.models.checkpoints.untouched import untouched_tensors

    check_exportable(student, config.checkpoint.quantized, config.parallelism)
    check_target(_target(config), *_read_by(config))
    source = _source(config.student.checkpoint)
    tokenizer = exported_tokenizer(source, Path(config.data.tokenizer) if config.data.tokenizer else None)
    copies = untouched_tensors(source, student) if config.checkpoint.copy_untouched else None
    try:
        if tokenizer is not None:
            load_tokenizer(str(tokenizer)).token_id("eos_token")
        export_files(student, dtype, source, tokenizer, copies).check()
    except ValueError as error:
        raise ValueError(f"{error}; or name another directory as data.tokenizer, or {NO_EXPORT}") from None
    if config.checkpoint.push_to is not None:
        Everyone().on_rank_0(partial(check_push, config.checkpoint, _target(config)))


def _target(config: RunConfig) -> Path:
    return Path(config.output_dir) / "student"


def _read_by(config: RunConfig) -> list[str | None]:
    """Return the paths that a run reads, and reads again when it is resumed."""
    models = [config.student.checkpoint, config.teacher.checkpoint if config.teacher else None]
    return [*models, config.data.tokenizer, *(prefix for _, prefix in named_corpora(config.data))]


def export(config: ExportConfig) -> None:
    """Write the student saved in a checkpoint as a Hugging Face directory. Every rank calls it.

    Args:
        config: checkpoint (a run's output directory, or one `step_*` directory), output and layout. The output appears
            only when whole and checked, and is then pushed if asked.

    Raises:
        ValueError: if there is no checkpoint, the layout does not fit, or transformers reads its source differently.
        RuntimeError: if the reloaded model's logits differ.
        PushError: if the push failed; the output is whole.
    """
    from distill_nemo.runtime.orphans import end_with_torchrun

    end_with_torchrun()
    with megatron_imports():
        from distill_nemo.checkpoint.load import check_whole
        from distill_nemo.models.checkpoints.huggingface import check_target

    config = on_this_machine(config)
    found, record, parallelism, student = saved_student(config, world_size())
    check_target(Path(config.output), config.checkpoint, config.tokenizer)
    place = _place(found.weights)
    card = partial(_card, student, _run_of(record), *place, config.push_to, config.quantized) if record else None
    require(card is not None or config.push_to is None, f"push_to needs a run, and {config.checkpoint} is none")
    refusal = _refusal(student, record) if rank() == 0 or is_joined() else None
    with process_groups(parallelism):
        raise_everywhere(refusal)
        everyone = Everyone()
        everyone.on_rank_0(partial(check_push, config, Path(config.output)))
        check_whole(student.name)
        tokenizer = config.tokenizer or (_tokenizer_of_run(record) if record else None)
        source = _source(config.checkpoint) if rank() == 0 else None
        chunks = [_stage(student, parallelism, found)]
        _export(chunks, config.output, student, tokenizer, source, config, card)
        _report(found.weights.name, config.output)
        everyone.on_rank_0(partial(push_directory, config, Path(config.output)))


class SavedStudent(NamedTuple):
    """A checkpoint to export: where it is, the record of its run, if it has one, its layout, its architecture."""

    found: FoundCheckpoint
    record: dict[str, Any] | None
    parallelism: ParallelismConfig
    student: "Architecture"


def saved_student(config: ExportConfig, ranks: int) -> SavedStudent:
    """Return what is to be exported on a number of ranks, from its description alone.

    Raises:
        ValueError: if there is no checkpoint, the layout does not fit, or the files cannot hold it.
    """
    from distill_nemo.models.checkpoints.exportable import check_exportable
    from distill_nemo.models.resolve import resolve

    found = find_checkpoint(Path(config.checkpoint))
    is_ours = found.kind is CheckpointKind.OURS
    record = read_record(found.weights) if is_ours else None
    parallelism = config.parallelism or _layout_of_run(record).on(ranks)
    check_layout_without_training(parallelism, ranks)
    # A run's step is named, since the run may save others meanwhile. Other checkpoints describe themselves.
    student = resolve(StudentConfig(checkpoint=str(found.weights) if is_ours else config.checkpoint))
    check_exportable(student, config.quantized, parallelism)
    return SavedStudent(found, record, parallelism, student)


def check_quantized(config: RunConfig | ExportConfig, ranks: int) -> None:
    """Refuse, before any rank starts, a quantised student that its layout or its export cannot have.

    Reads its description alone, and imports Megatron.

    Raises:
        ValueError: as the ranks would: from `quantized_as`, `check_layout` and `check_exportable`.
    """
    with megatron_imports():
        from distill_nemo.models.checkpoints.exportable import check_exportable
        from distill_nemo.models.layouts import check_layout
        from distill_nemo.models.resolve import quantized_as, resolve

    if isinstance(config, ExportConfig):
        saved_student(config, ranks)
        return
    student = quantized_as(resolve(config.student), config.quantization)
    check_layout(student, config.parallelism)
    if config.checkpoint.export:
        check_exportable(student, config.checkpoint.quantized, config.parallelism)


def _layout_of_run(record: dict[str, Any] | None) -> ParallelismConfig:
    return from_dict((record or {}).get("parallelism", {}), ParallelismConfig, "run.json: parallelism.")


def _place(weights: Path) -> tuple[Path, int | None]:
    """Return the directory of the run and the step of a checkpoint; None for one that was moved out of its run."""
    return (weights.parents[1], int(weights.name[5:])) if STEP.fullmatch(weights.name) else (weights, None)


def _run_of(record: dict[str, Any]) -> RunConfig:
    """Return the config in `run.json`; fields that this version does not know are refused."""
    return from_dict({each.name: record[each.name] for each in fields(RunConfig) if each.name in record})


def _stage(student: "Architecture", parallelism: ParallelismConfig, found: FoundCheckpoint) -> "GPTModel":
    """Build this rank's pipeline stage, in the dtype of the checkpoint."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.models.checkpoints.megatron import stored_dtype
    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.device import resolve_dtype
    from distill_nemo.runtime.seed import seed_everything

    seed_everything(0)
    model = model_provider(
        parallel_state.is_pipeline_first_stage(),
        parallel_state.is_pipeline_last_stage(),
        student=student,
        parallelism=parallelism,
        dtype=resolve_dtype("auto") if found.kind is CheckpointKind.HUGGING_FACE else stored_dtype(found.weights),
    )
    assert isinstance(model, GPTModel)
    return model.cuda()


def _refusal(student: "Architecture", record: dict[str, Any] | None) -> str | None:
    """Return the reason not to export a student that transformers reads differently, or None."""
    from distill_nemo.models.source_check import check_source

    try:
        check_source(student)
        if record is not None:
            _check_source_of_run(record, student)
    except ValueError as error:
        return str(error)
    return None


def _check_source_of_run(record: dict[str, Any], student: "Architecture") -> None:
    """Compare a run's architecture with the Hugging Face directory that its student came from, if that still exists.

    Raises:
        ValueError: if transformers reads that directory differently than the run did.
    """
    from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors
    from distill_nemo.models.resolve import read_source, resolve
    from distill_nemo.models.source_check import check_source

    checkpoint = cached(record["student"]["checkpoint"] or "")
    if not checkpoint or not Path(checkpoint).is_dir():
        return
    try:
        source, _ = read_source(checkpoint)
        if source.kind is not CheckpointKind.HUGGING_FACE:
            return
        check_hf_tensors(source.weights, replace(student, source=source).as_stored)
    except ValueError as error:
        print(f"warning: the run's source is now another model and was not compared: {error}", file=sys.stderr)
        return
    try:
        check_source(resolve(student.filled(StudentConfig(checkpoint))))
    except ValueError as error:
        raise ValueError(f"the run did not read its student as transformers does; train again: {error}") from None


def _tokenizer_of_run(record: dict[str, Any]) -> str | None:
    """Return the tokenizer directory that the run names, if it still exists."""
    named = cached(record["data"]["tokenizer"] or "")
    if named and not Path(named).is_dir():
        print(f"warning: data.tokenizer = {named} does not exist any more", file=sys.stderr, flush=True)
        return None
    return named or None


def _source(checkpoint: str | None) -> Path | None:
    """Return the Hugging Face directory that a model came from, perhaps through several runs, or None."""
    passed: set[Path] = set()
    while checkpoint:
        if not Path(checkpoint).is_dir():
            print(
                f"warning: {checkpoint}, where the student came from, does not exist any more: the export lacks its "
                "tokenizer, its generation_config.json and the fields of its config.json besides the architecture",
                file=sys.stderr,
                flush=True,
            )
            return None
        found = find_checkpoint(Path(checkpoint))
        if found.kind is CheckpointKind.HUGGING_FACE:
            return found.weights
        if found.kind is not CheckpointKind.OURS or found.weights in passed:
            return None
        passed.add(found.weights)
        checkpoint = cached(read_record(found.weights)["student"]["checkpoint"] or "")
    return None

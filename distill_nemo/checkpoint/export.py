"""Export a trained student to a Hugging Face directory: at the end of a run from its ranks, or later a saved step."""

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig
from distill_nemo.runtime.process_groups import process_groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.models.architecture import Architecture


def export_from_run(config: RunConfig, student: "Architecture", chunks: "list[GPTModel]") -> None:
    """Export the trained student from the ranks that hold it. Every rank calls it, when the optimizer is gone.

    Raises:
        RuntimeError: when the export failed; the checkpoint is whole, and the message says how to try again.
    """
    from distill_nemo.models.checkpoints.huggingface import export_hf
    from distill_nemo.runtime.process_groups import rank

    gc.collect()
    torch.cuda.empty_cache()
    source = _source(config.student.checkpoint) if rank() == 0 else None
    try:
        export_hf(chunks, str(_target(config)), student, config.data.tokenizer, source)
    except (ValueError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"export failed; the checkpoint is whole: {error}. Run the same command again to export it, or in one "
            f"process: nemo distill export checkpoint={config.output_dir} output={_target(config)}"
        ) from error
    _report(f"step_{config.training.steps:08d}", str(_target(config)))


def _report(exported: str, output: str) -> None:
    from distill_nemo.runtime.process_groups import rank

    if rank() == 0:
        print(f"exported {exported} to {output}: the reloaded model gives the same logits", flush=True)


def prepare_export(config: RunConfig, student: "Architecture", dtype: torch.dtype) -> None:
    """Refuse a run whose export would fail, before its first step. Writes nothing.

    Raises:
        ValueError: if transformers has no class for the student, refuses its sizes, or cannot open its tokenizer; or
            if the export's directory must not be replaced.
    """
    from distill_nemo.data.tokenizer import load_tokenizer
    from distill_nemo.models.checkpoints.export_files import NO_EXPORT, export_files, exported_tokenizer
    from distill_nemo.models.checkpoints.huggingface import check_exportable, check_target

    check_exportable(student)
    check_target(_target(config))
    source = _source(config.student.checkpoint)
    tokenizer = exported_tokenizer(source, Path(config.data.tokenizer) if config.data.tokenizer else None)
    if tokenizer is not None:
        try:
            load_tokenizer(str(tokenizer)).token_id("eos_token")
        except ValueError as error:
            raise ValueError(f"{error}; repair it, name another directory as data.tokenizer, or {NO_EXPORT}") from None
    export_files(student, dtype, source, tokenizer).check()


def _target(config: RunConfig) -> Path:
    return Path(config.output_dir) / "student"


def export(checkpoint: str, output: str, tokenizer: str | None = None) -> None:
    """Write the student saved in `checkpoint` as a Hugging Face directory. Needs one process.

    Args:
        checkpoint: a run's output directory, or one `step_*` directory.
        output: directory to write; it appears only when whole and checked.
        tokenizer: tokenizer directory to copy beside the weights; by default the run's, or the checkpoint's own.

    Raises:
        ValueError: if `checkpoint` is no checkpoint, or transformers reads its source differently.
        RuntimeError: if the reloaded model's logits differ.
    """
    from distill_nemo.runtime.device import resolve_dtype, setup_device

    setup_device()  # before Megatron is imported
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.checkpoint.directory import read_record
    from distill_nemo.checkpoint.load import check_whole
    from distill_nemo.models.checkpoints.huggingface import check_exportable, check_target, export_hf
    from distill_nemo.models.checkpoints.megatron import stored_dtype
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source
    from distill_nemo.models.sources import CheckpointKind, find_checkpoint
    from distill_nemo.runtime.seed import seed_everything

    found = find_checkpoint(Path(checkpoint))
    where = found.weights
    check_target(Path(output))
    # A run's step is named, since the run may save others meanwhile. Other checkpoints describe themselves.
    student = resolve(StudentConfig(checkpoint=str(where) if found.kind is CheckpointKind.OURS else checkpoint))
    check_exportable(student)
    check_source(student)
    dtype = resolve_dtype("auto") if found.kind is CheckpointKind.HUGGING_FACE else stored_dtype(where)
    if found.kind is CheckpointKind.OURS:
        _check_source_of_run(read_record(where), student)
    if found.kind is CheckpointKind.OURS and not tokenizer:
        tokenizer = _tokenizer_of_run(read_record(where))
    with process_groups(ParallelismConfig()):
        check_whole(student.name)
        seed_everything(0)
        model = model_provider(student=student, parallelism=ParallelismConfig(), dtype=dtype)
        assert isinstance(model, GPTModel)
        export_hf([model.cuda()], output, student, tokenizer, _source(checkpoint))
    _report(where.name, output)


def _check_source_of_run(record: dict[str, Any], student: "Architecture") -> None:
    """Compare a run's architecture with the Hugging Face directory that its student came from, if that still exists.

    Raises:
        ValueError: if transformers reads that directory differently than the run did.
    """
    from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors
    from distill_nemo.models.resolve import read_source, resolve
    from distill_nemo.models.source_check import check_source
    from distill_nemo.models.sources import CheckpointKind

    checkpoint = record["student"]["checkpoint"]
    if checkpoint is None or not Path(checkpoint).is_dir():
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
    named = record["data"]["tokenizer"]
    if named and not Path(named).is_dir():
        print(f"warning: data.tokenizer = {named} does not exist any more", file=sys.stderr, flush=True)
        return None
    return named


def _source(checkpoint: str | None) -> Path | None:
    """Return the Hugging Face directory that a model came from, perhaps through several runs, or None."""
    from distill_nemo.checkpoint.directory import read_record
    from distill_nemo.models.sources import CheckpointKind, find_checkpoint

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
        checkpoint = read_record(found.weights)["student"]["checkpoint"]
    return None

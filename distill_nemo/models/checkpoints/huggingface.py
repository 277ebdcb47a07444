"""Load weights from Hugging Face directories, and export them. An export appears once it is complete and checked."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel

from distill_nemo.fields import first_few, require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.agreement import logits_apart, open_with_transformers
from distill_nemo.models.checkpoints.by_layers import open_by_layers
from distill_nemo.models.checkpoints.earlier_export import CARD, added_to, sealed
from distill_nemo.models.checkpoints.export_files import export_files
from distill_nemo.models.checkpoints.file_formats import FILE_FORMATS
from distill_nemo.models.checkpoints.hf_tensors import PieceReader, check_tied_weights
from distill_nemo.models.checkpoints.local_parameters import local_parameters
from distill_nemo.models.checkpoints.untouched import untouched_tensors
from distill_nemo.models.checkpoints.write_safetensors import (
    MAX_FILE_BYTES,
    check_written,
    is_export_of_ours,
    write_weights,
)
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.quantizers.convert import quantizers_of
from distill_nemo.models.stored_quantization import FIELD
from distill_nemo.quantization import ExportFormatName
from distill_nemo.runtime.everyone import AgreedError, Everyone
from distill_nemo.runtime.files import partial_of, read_object, restore_replaced, resuming_directory
from distill_nemo.runtime.host_memory import available_memory
from distill_nemo.runtime.output_lock import OutputLock

MEMORY_TO_OPEN = 1.5  # memory to open a model, as a multiple of its weights


def load_hf_weights(built: GPTModel, model: Architecture) -> None:
    """Fill this rank's part of `built` from the safetensors of its source: every row of every parameter.

    A rank reads only the pieces that it keeps.

    Args:
        built: model to fill.
        model: its architecture, with a Hugging Face source whose headers `check_hf_tensors` has read.

    Raises:
        ValueError: if embeddings are tied and a different output layer is stored beside them.
    """
    assert model.source is not None
    check_tied_weights(model.source.tensors, model)
    with PieceReader(model.source.tensors) as reader:
        for parameter in local_parameters(built, model):
            parameter.fill(reader.read)


def export_hf(
    chunks: list[GPTModel],
    path: str,
    model: Architecture,
    tokenizer: str | None = None,
    source: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    copy_untouched: bool = False,
    quantized: ExportFormatName = "modelopt",
    card: Callable[[], str] | None = None,
) -> None:
    """Write a model as a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` opens.

    Collective, at any layout; all ranks share the file system of `path`. The directory appears only after two checks:
    its tensors, read back, equal every rank's weights bit for bit, and transformers' logits agree with ours. Quantised
    weights are dequantised for both, and inputs of layers are not rounded on either side.

    Args:
        chunks: this rank's pipeline stages.
        path: directory to write. An earlier export there is replaced, anything else refused.
        model: the architecture.
        tokenizer: directory whose tokenizer is copied; None copies the source's.
        source: the Hugging Face directory that the model came from, whose configuration and files are kept.
        max_file_bytes: limit on the bytes of tensors in one file.
        copy_untouched: copy the tensors of `source` that the model does not have.
        quantized: format of a quantised model's weights; none: rounded, as plain ones.
        card: returns README.md. It is called on rank 0.

    Raises:
        ValueError: if `path` holds anything but an earlier export, another process writes there, `tokenizer` holds no
            tokenizer, or transformers refuses what would be written.
        OSError: if the export cannot be written. An earlier export stays as it is.
        RuntimeError: if the tensors or the reloaded model's logits differ, or another rank could not write.
    """
    dtype = next(chunks[0].parameters()).dtype
    everyone = Everyone()
    file_format = FILE_FORMATS[quantized] if quantized != "none" and model.quantization is not None else None
    with contextlib.ExitStack() as aside:  # used on rank 0 only

        def begin() -> tuple[str, str | None]:
            copies = untouched_tensors(source, model) if copy_untouched else None
            files = export_files(model, dtype, source, Path(tokenizer) if tokenizer else None, copies)
            files.check()
            partial = aside.enter_context(writing_export(Path(path)))
            files.write(partial)
            if card is not None:
                (partial / CARD).write_text(sealed(card()), encoding="utf-8")
            return str(partial), str(source) if copies else None

        partial, copied = everyone.on_rank_0(begin)
        partial, untouched = Path(partial), untouched_tensors(Path(copied), model) if copied else None
        write_weights(chunks, model, partial, max_file_bytes, everyone, untouched, file_format)
        check_written(chunks, model, partial, everyone, untouched, file_format)
        check_export(chunks, model, partial, everyone=everyone)
        everyone.on_rank_0(aside.close)


@contextlib.contextmanager
def plain_activations(chunks: list[GPTModel]) -> Iterator[None]:
    """Leave activations and the cache of quantised students unrounded meanwhile."""
    quantizers = [each.module for chunk in chunks for each in quantizers_of(chunk) if not each.of_weight]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


@contextlib.contextmanager
def writing_export(path: Path, kept: str = "") -> Iterator[Path]:
    """Yield a directory to write an export into. It replaces `path` at the end, or is removed on a failure.

    If this process or another rank is killed instead, it stays: the next export finds the weights in it, and the file
    `kept`.

    Raises:
        ValueError: if `path` may not be replaced, or another process writes there.
        OSError: if it cannot be written.
    """
    check_target(path)
    target = path.resolve()
    with OutputLock(target.with_name(f".{target.name}.lock"), f"output = {path}"):
        restore_replaced(target)
        check_target(path)  # again: another export may have ended meanwhile
        try:
            with resuming_directory(target) as partial:
                for file in (file for file in partial.rglob("*") if file.is_file()):
                    if file.suffix != ".safetensors" and file.name != kept:
                        file.unlink()
                yield partial
        except (ValueError, OSError, AgreedError) as error:
            shutil.rmtree(partial_of(target), ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"output = {path}: the export could not be written: {error.strerror or error}; what was there before "
                "is unchanged"
            ) from error


def check_target(target: Path, *read: str | None) -> None:
    """Refuse a target for an export, which replaces only an empty directory, or the files of an earlier export.

    Args:
        target: directory to write.
        *read: paths that are read for it, of which none may be lost with an earlier export.

    Raises:
        ValueError: if anything else is there, the target cannot be written, or it holds one of `read`, or a file that
            was added to an earlier export, or its model card was edited.
    """
    lost = next((path for path in read if path and Path(path).resolve().is_relative_to(target.resolve())), None)
    if lost is not None:
        raise ValueError(f"{target} would be replaced, and {lost} is read from it: name another directory to write")
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{target} cannot be written: {there} is not a writable directory; choose another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not is_export_of_ours(target):
        raise ValueError(
            f"{target} exists and is not a distill-nemo export; name a new directory, or remove it yourself"
        )
    added = added_to(target)
    require(
        not added,
        f"{target} would be replaced by the new export, and with it what was added or edited since the last one: "
        f"{', '.join(first_few(added))}; move that elsewhere, or name another directory",
    )


def check_export(
    chunks: list[GPTModel],
    model: Architecture,
    path: Path,
    tolerance: float = 1e-4,
    everyone: Everyone | None = None,
) -> None:
    """Reload `path` with transformers and compare its logits with Megatron's on random tokens. Every rank calls it.

    Inputs of quantised layers and the cache are not rounded meanwhile: transformers does not round them. If weights are
    quantised or do not fit the memory of rank 0's host, transformers is given one layer at a time.

    Raises:
        RuntimeError: if the norm of the difference exceeds `tolerance` of the norm of the logits; 0.1 below fp32,
            where other kernels alone give 0.03 and unrelated logits 1.4.
    """
    everyone, dtype = everyone or Everyone(), next(chunks[0].parameters()).dtype
    needed, changes = MEMORY_TO_OPEN * num_parameters(model) * dtype.itemsize, FAMILIES[model.family].reference

    def reference() -> PreTrainedModel:
        is_quantized = FIELD in read_object(path / "config.json")
        if needed < available_memory() and not is_quantized:
            return open_with_transformers(path, dtype, **changes)
        if not is_quantized:
            print(f"{path} does not fit this host's memory: transformers reads it a layer at a time", flush=True)
        return open_by_layers(path, dtype, model, **changes)

    with plain_activations(chunks):
        apart = logits_apart(chunks, reference, model.vocab_size, everyone)
    allowed = tolerance if dtype == torch.float32 else 0.1
    if not apart <= allowed:
        raise AgreedError(f"{path}: the exported model's logits differ by {apart:.2e}, allowed {allowed:.2e}")

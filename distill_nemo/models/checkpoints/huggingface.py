"""Weights from and to Hugging Face directories, through ModelOpt's importer and exporter.

What is added: vocabularies are padded and cut, only safetensors are read, and an export appears only when whole.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export.plugins.megatron_importer import GPTModelImporter
from modelopt.torch.export.unified_export_megatron import GPTModelExporter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_nemo.models.architecture import Architecture, padded_vocab_size
from distill_nemo.models.checkpoints.agreement import logits_apart, open_with_transformers
from distill_nemo.models.checkpoints.export_files import NO_EXPORT, export_files
from distill_nemo.models.checkpoints.hf_tensors import VOCAB_TENSORS, check_tied_weights, expected_tensors
from distill_nemo.models.checkpoints.megatron import STATE
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.layers.experts import one_expert
from distill_nemo.runtime.files import read_object, restore_replaced, writing_directory
from distill_nemo.runtime.output_lock import OutputLock

METADATA = {"format": "pt", "producer": "distill_nemo"}  # by which an export of ours is known, and may be replaced


def load_hf_weights(built: GPTModel, path: Path, model: Architecture) -> None:
    """Fill this tensor- and pipeline-parallel part of `built` from the safetensors in `path`.

    Args:
        built: where the weights go.
        path: a directory whose headers `check_hf_tensors` has compared with `model`.
        model: its architecture.

    Raises:
        ValueError: when embeddings are tied and another output layer is stored beside them.
    """
    check_tied_weights(path, model)
    _Importer(built, path, model)._import_state_dict()


class _Importer(GPTModelImporter):
    """ModelOpt's, with the vocabulary cut or padded to the rows that Megatron has, and without its progress bar."""

    def __init__(self, built: GPTModel, path: Path, model: Architecture) -> None:
        with tempfile.TemporaryDirectory() as stated:  # it reads nothing of config.json but the class
            Path(stated, "config.json").write_text(json.dumps(_stated_for_modelopt(model)))
            super().__init__(built, stated, dtype=next(built.parameters()).dtype)
        self.pretrained_model_path = path
        self.disable_tqdm = True
        self.vocab_size = model.vocab_size
        self.rules |= grouped_rules(self.rules)

    def _get_safetensor(self, key: str, parallel_config: Any = None) -> Tensor:
        if key not in VOCAB_TENSORS:
            return super()._get_safetensor(key, parallel_config)
        rows = super()._get_safetensor(key, None)[: self.vocab_size]
        padded = rows.new_zeros(padded_vocab_size(self.vocab_size), rows.shape[1])
        padded[: self.vocab_size] = rows
        size, rank = (f() for f in (_tensor_parallel_size, parallel_state.get_tensor_model_parallel_rank))
        return padded.chunk(size)[rank]


def _stated_for_modelopt(model: Architecture) -> dict[str, Any]:
    """Return the fields by which ModelOpt chooses its rules."""
    family = FAMILIES[model.family]
    family = FAMILIES[family.tensors_like or family.model_type]
    return {"model_type": family.model_type, "architectures": [family.hf_class]}


class _Exporter(GPTModelExporter):
    """ModelOpt's, which has no rule for Qwen3's experts where they are one grouped module."""

    def _populate_rule_book(self) -> dict[str, Any]:
        books = super()._populate_rule_book()
        return {name: rules | grouped_rules(rules) for name, rules in books.items()}


def grouped_rules(rules: dict[str, Any]) -> dict[str, Any]:
    """Rules for Transformer Engine's grouped experts: those for single experts, one after another."""

    def rule(single: Any) -> Any:
        def apply(grouped: Any, layer: int, init_expert_id: int = 0, num_local_experts: int = 0, **more: Any) -> None:
            for i in range(num_local_experts or grouped.num_gemms):
                single(one_expert(grouped, i), layer, init_expert_id + i, **more)

        return apply

    names = ("linear_fc1", "linear_fc2")
    return {f"experts.{n}": rule(rules[f"local_experts.{n}"]) for n in names if f"local_experts.{n}" in rules}


def _tensor_parallel_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def check_exportable(model: Architecture) -> None:
    """Refuse a model that no class of transformers can hold.

    Raises:
        ValueError: saying why, and what can be done.
    """
    if model.block_configs is not None:
        raise ValueError(f"block_configs: transformers has no model whose layers differ; {NO_EXPORT}")
    if model.source is not None and (model.source.weights / STATE).is_dir():
        raise ValueError(
            f"{model.name} was modified by ModelOpt (quantised, say): that cannot be exported yet; {NO_EXPORT}"
        )


def export_hf(
    built: GPTModel, path: str, model: Architecture, tokenizer: str | None = None, source: Path | None = None
) -> None:
    """Write `built` (TP=1, PP=1) as a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` opens.

    Args:
        built: the whole model.
        path: directory to write; it appears only when whole and its logits equal `built`'s. An earlier export there
            is replaced, anything else refused.
        model: its architecture.
        tokenizer: directory whose tokenizer is copied; None copies the source's.
        source: the Hugging Face directory that the model came from, whose configuration and files are kept.

    Raises:
        ValueError: when `path` holds something else than an export of ours, another process writes there, `tokenizer`
            holds no tokenizer, or transformers refuses what would be written.
        OSError: when it cannot be written; an earlier export stays as it is.
        RuntimeError: when the reloaded model's logits differ.
    """
    assert _tensor_parallel_size() == 1 and built.pre_process and built.post_process, "export needs the whole model"
    dtype = next(built.parameters()).dtype
    files = export_files(model, dtype, source, Path(tokenizer) if tokenizer else None)
    files.check()
    with writing_export(Path(path)) as partial:
        files.write(partial)
        _save(_hf_tensors(built, partial, model, dtype), partial / "model.safetensors")
        check_export(built, str(partial))


@contextlib.contextmanager
def writing_export(path: Path) -> Iterator[Path]:
    """Yield a directory to write an export into. It takes the place of `path` at the end, or disappears on an error.

    Raises:
        ValueError: when `path` may not be replaced, or another process writes there.
        OSError: when it cannot be written.
    """
    check_target(path)
    target = path.resolve()
    with OutputLock(target.with_name(f".{target.name}.lock"), f"output = {path}"):
        restore_replaced(target)
        check_target(path)  # again: another export may have ended meanwhile
        try:
            with writing_directory(target) as partial:
                yield partial
        except OSError as error:
            raise OSError(
                f"output = {path}: the export could not be written: {error.strerror or error}; what was there before "
                "is unchanged"
            ) from error


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, METADATA)
    except SafetensorError as error:  # as it says that a disk is full
        raise OSError(str(error)) from None


def check_target(target: Path) -> None:
    """Refuse a place for an export: it replaces only an empty directory or an earlier export.

    Raises:
        ValueError: for anything else that is there, and for a place that cannot be written to.
    """
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{target} cannot be written: {there} is no directory that may be written to; choose another")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        with safe_open(target / "model.safetensors", "pt") as tensors:
            ours = (tensors.metadata() or {}).get("producer") == METADATA["producer"]
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise ValueError(f"{target} exists and is no export of ours; name a new directory, or remove it yourself")


def _hf_tensors(built: GPTModel, export: Path, model: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as stated:
        config = read_object(export / "config.json") | _stated_for_modelopt(model)
        Path(stated, "config.json").write_text(json.dumps(config))
        with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints its MoE settings
            exporter = _Exporter(built, stated, dtype=dtype)
        merged = {name: t for part in exporter.layer_state_dicts.values() for name, t in part.items()}
    for name in VOCAB_TENSORS:
        if name in merged:
            merged[name] = merged[name][: model.vocab_size]
    wanted = expected_tensors(model)
    assert wanted.keys() <= merged.keys(), f"ModelOpt's exporter left out {sorted(wanted.keys() - merged.keys())[:3]}"
    wrong = [name for name, shape in wanted.items() if tuple(merged[name].shape) != shape]
    assert not wrong, f"ModelOpt's exporter gave other shapes: {wrong[:3]}"
    return {name: merged[name].detach().cpu().contiguous().clone() for name in wanted}


def check_export(built: GPTModel, path: str, tolerance: float = 1e-4) -> None:
    """Reload `path` with transformers and compare its logits with Megatron's on random tokens.

    Raises:
        RuntimeError: when the norm of the difference exceeds `tolerance` of the norm of the logits; 0.1 below fp32,
            where other kernels alone give 0.03 and unrelated logits 1.4.
    """
    dtype = next(built.parameters()).dtype
    reloaded = open_with_transformers(path, dtype)
    apart = logits_apart(built, reloaded, reloaded.config.vocab_size)
    allowed = tolerance if dtype == torch.float32 else 0.1
    if not apart <= allowed:
        raise RuntimeError(f"{path}: the exported model's logits differ by {apart:.2e}, allowed {allowed:.2e}")

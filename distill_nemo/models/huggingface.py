"""Weights from and to Hugging Face directories, through ModelOpt's importer and exporter.

What is added: vocabularies are padded and cut, only safetensors are read, and an export appears only when whole.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
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

from distill_nemo.config import ModelConfig
from distill_nemo.models.agreement import logits_apart, open_with_transformers
from distill_nemo.models.architecture import padded_vocab_size
from distill_nemo.models.experts import one_expert
from distill_nemo.models.hf_config import FAMILIES, to_huggingface
from distill_nemo.models.hf_tensors import VOCAB_TENSORS, check_tied_weights, expected_tensors
from distill_nemo.models.megatron_weights import STATE
from distill_nemo.models.pretrained import open_pretrained
from distill_nemo.models.sources import find_checkpoint

METADATA = {"format": "pt", "producer": "distill_nemo"}  # by which an export of ours is known, and may be replaced
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.jinja")


def load_hf_weights(built: GPTModel, path: str, model: ModelConfig) -> None:
    """Fill this tensor- and pipeline-parallel part of `built` from the safetensors in `path`.

    Args:
        built: where the weights go.
        path: a directory whose headers `check_hf_tensors` has compared with `model`.
        model: its resolved architecture.

    Raises:
        ValueError: when embeddings are tied and another output layer is stored beside them.
    """
    check_tied_weights(Path(path), model)
    _Importer(built, path, model)._import_state_dict()


class _Importer(GPTModelImporter):
    """ModelOpt's, with the vocabulary cut or padded to the rows that Megatron has, and without its progress bar."""

    def __init__(self, built: GPTModel, path: str, model: ModelConfig) -> None:
        assert model.vocab_size is not None and model.family is not None, "resolved"
        vocab_size = model.vocab_size
        with tempfile.TemporaryDirectory() as stated:  # it reads nothing of config.json but the class
            config = {"model_type": model.family, "architectures": [FAMILIES[model.family]]}
            Path(stated, "config.json").write_text(json.dumps(config))
            super().__init__(built, stated, dtype=next(built.parameters()).dtype)
        self.pretrained_model_path = Path(path)
        self.disable_tqdm = True
        self.vocab_size = vocab_size
        self.rules |= grouped_rules(self.rules)

    def _get_safetensor(self, key: str, parallel_config: Any = None) -> Tensor:
        if key not in VOCAB_TENSORS:
            return super()._get_safetensor(key, parallel_config)
        rows = super()._get_safetensor(key, None)[: self.vocab_size]
        padded = rows.new_zeros(padded_vocab_size(self.vocab_size), rows.shape[1])
        padded[: self.vocab_size] = rows
        size, rank = (f() for f in (_tensor_parallel_size, parallel_state.get_tensor_model_parallel_rank))
        return padded.chunk(size)[rank]


class _Exporter(GPTModelExporter):
    """ModelOpt's, which has no rule for Qwen3's experts where they are one grouped module."""

    def _populate_rule_book(self) -> dict[str, Any]:
        books: Any = super()._populate_rule_book()
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


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that no class of transformers can hold.

    Raises:
        ValueError: saying why, and what can be done.
    """
    advice = "train with checkpoint.export=false, and keep the Megatron checkpoint"
    if model.block_configs is not None:
        raise ValueError(f"block_configs: transformers has no model whose layers differ; {advice}")
    if model.checkpoint and (find_checkpoint(Path(model.checkpoint)).weights / STATE).is_dir():
        raise ValueError(
            f"{model.checkpoint} was modified by ModelOpt (quantised, say): that cannot be exported yet; {advice}"
        )


def export_hf(built: GPTModel, path: str, model: ModelConfig, tokenizer: str | None = None) -> None:
    """Write `built` (TP=1, PP=1) as a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` opens.

    Args:
        built: the whole model.
        path: directory to write; it appears only when whole and its logits equal `built`'s. An earlier export there
            is replaced, anything else refused.
        model: the resolved architecture.
        tokenizer: directory whose tokenizer files are copied.

    Raises:
        ValueError: when `path` holds something else than an export of ours, or `tokenizer` no tokenizer.
        RuntimeError: when the reloaded model's logits differ.
    """
    assert _tensor_parallel_size() == 1 and built.pre_process and built.post_process, "export needs the whole model"
    files = _needed_tokenizer_files(tokenizer)
    check_target(Path(path))
    dtype = next(built.parameters()).dtype
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = to_huggingface(model, dtype) | _special_tokens(tokenizer)
    try:
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        save_file(_hf_tensors(built, partial, model, dtype), partial / "model.safetensors", METADATA)
        for file in files:
            shutil.copy2(file, partial / file.name)
        check_export(built, str(partial))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _needed_tokenizer_files(tokenizer: str | None) -> list[Path]:
    if not tokenizer:
        return []
    files = tokenizer_files(Path(tokenizer))
    if not files:
        raise ValueError(f"{tokenizer} holds no tokenizer files ({', '.join(TOKENIZER_FILES)})")
    generation = Path(tokenizer, "generation_config.json")  # where an answer may end at several tokens
    return [*files, generation] if generation.is_file() else files


def _special_tokens(tokenizer: str | None) -> dict[str, int | None]:
    """`bos_token_id` and `eos_token_id`, by which generation starts and ends, as the tokenizer has them."""
    from transformers import AutoTokenizer

    if not tokenizer:
        return {}
    loaded = open_pretrained(AutoTokenizer, tokenizer)
    return {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in a directory; none where it holds no tokenizer."""
    return [file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()]


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


def _hf_tensors(built: GPTModel, config: Path, model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as empty:
        shutil.copy2(config / "config.json", empty)
        with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints its MoE settings
            exporter = _Exporter(built, empty, dtype=dtype)
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

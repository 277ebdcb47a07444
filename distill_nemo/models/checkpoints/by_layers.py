"""Run a Hugging Face directory with transformers a layer at a time, so that no two layers' weights are in memory."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill_nemo.models.checkpoints.hf_tensors import PieceReader, stored_tensors
from distill_nemo.models.checkpoints.pretrained import open_pretrained
from distill_nemo.models.families.pieces import Piece

OF_EXPERTS = re.compile(r"(.+\.experts)\.(\w+)_proj")  # transformers 5 joins matrices that are stored one by one
MIXTRAL_BLOCK, MIXTRAL_PARTS = ".block_sparse_moe.", {"gate": "w1", "up": "w3", "down": "w2"}  # it also renames these


class _EmptyOnMeta(TorchFunctionMode):
    """Make uninitialised tensors, which weights are at first, without memory. Constants keep their values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **on_meta})


def open_by_layers(path: Path, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """Return the model in a directory. A layer's weights are read when it is called, and dropped when it returns.

    Args:
        path: a directory that safetensors describe.
        dtype: dtype of the weights.
        changes: values that override fields of its config.json.
    """
    config = open_pretrained(AutoConfig, path, **changes)
    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        ).eval()
    weights = _Weights(path, dtype)
    for name, module in _units(model):
        _stream(name, module, weights)
    return model


def _units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers, and each module outside them that has weights of its own."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    inside = {child for layer in layers for child in layer.modules()}
    for name, module in model.named_modules():
        if module in set(layers) or (module not in inside and any(True for _ in module.parameters(recurse=False))):
            yield name, module


class _Weights:
    """Weights of a directory, by their names in transformers' model."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored_tensors(path), dtype
        self._prefix = next(name.partition("layers.")[0] for name in self._stored if "layers." in name)
        self._of_mixtral = any(MIXTRAL_BLOCK in name for name in self._stored)

    def __contains__(self, name: str) -> bool:
        return self._in_file(name) in self._stored

    def _in_file(self, name: str) -> str:
        name = name.replace("model.", self._prefix, 1)
        return name.replace(".mlp.", MIXTRAL_BLOCK) if self._of_mixtral else name

    def read(self, name: str) -> Tensor:
        """Return a whole parameter or buffer."""
        name = self._in_file(name)
        of_experts = OF_EXPERTS.fullmatch(name)
        with PieceReader(self._stored) as reader:
            if name in self._stored:
                return self._whole(name, reader)
            if of_experts is None:  # tied
                return self._whole("model.embed_tokens.weight", reader)
            experts, parts = of_experts.groups()
            return torch.stack([self._expert(one, parts.split("_"), reader) for one in self._experts_of(experts)])

    def _experts_of(self, prefix: str) -> list[str]:
        count = len({match[1] for name in self._stored if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})
        return [f"{prefix}.{number}" for number in range(count)]

    def _expert(self, expert: str, parts: list[str], reader: PieceReader) -> Tensor:
        names = [MIXTRAL_PARTS[part] if self._of_mixtral else f"{part}_proj" for part in parts]
        return torch.cat([self._whole(f"{expert}.{name}.weight", reader) for name in names])

    def _whole(self, name: str, reader: PieceReader) -> Tensor:
        index = tuple(slice(0, size) for size in self._stored[name].shape)
        return reader.read(Piece(name, index)).to(self._dtype)


def _stream(prefix: str, unit: nn.Module, weights: _Weights) -> None:
    """Make `unit` read its weights before each call, and drop them after it."""
    found: list[tuple[dict[str, Any], str, str]] = [
        (kind, name, ".".join(filter(None, (prefix, where, name))))
        for where, module in unit.named_modules()
        for kind in (module._parameters, module._buffers)
        for name, value in kind.items()
        if value is not None
    ]
    own = [each for each in found if isinstance(each[0][each[1]], nn.Parameter) or each[2] in weights]

    def read(*_: Any) -> None:
        for kind, name, full_name in own:
            kind[name] = _as_kind(weights.read(full_name), kind[name])

    def drop(*_: Any) -> None:
        for kind, name, _full_name in own:
            kind[name] = _as_kind(kind[name].to("meta"), kind[name])

    drop()
    unit.register_forward_pre_hook(read)
    unit.register_forward_hook(drop)


def _as_kind(value: Tensor, like: Tensor | None) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value

"""Run a Hugging Face directory with transformers a layer at a time, so that no two layers' weights are in memory."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import PieceReader, of_text_model, stored_tensors
from distill_nemo.models.checkpoints.pretrained import new_model, open_pretrained
from distill_nemo.models.checkpoints.quantized import merge_scales
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.pieces import EXPERT, Piece, Place, experts
from distill_nemo.models.families.tensors import table_of
from distill_nemo.models.stored_quantization import read_stored_quantization
from distill_nemo.runtime.files import read_object

IN_LAYER = re.compile(r".+\.layers\.(\d+)\.\w+\.(.+)")
JOINED = {  # what transformers 5 makes of several stored tensors, or names differently -> Megatron's parameter
    "experts.gate_up_proj": EXPERT + "linear_fc1.weight",
    "experts.up_proj": EXPERT + "linear_fc1.weight",
    "experts.down_proj": EXPERT + "linear_fc2.weight",
    "gate.weight": "mlp.router.weight",
    "router.weight": "mlp.router.weight",
}


class _EmptyOnMeta(TorchFunctionMode):
    """Make uninitialised tensors, which weights are at first, without memory. Constants keep their values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **on_meta})


def open_by_layers(path: Path, dtype: torch.dtype, architecture: Architecture, **changes: Any) -> PreTrainedModel:
    """Return the model in a directory. A layer's weights are read when it is called, and dropped when it returns.

    Args:
        path: a directory that safetensors describe. Quantised weights are dequantised.
        dtype: dtype of the weights.
        architecture: of the model.
        changes: values that override fields of its config.json.
    """
    config = open_pretrained(AutoConfig, path, **changes)
    with _EmptyOnMeta():
        model = new_model(config, dtype=dtype, attn_implementation="eager").eval()
    weights = _Weights(path, dtype, architecture)
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

    def __init__(self, path: Path, dtype: torch.dtype, model: Architecture) -> None:
        stored, config = stored_tensors(path), path / "config.json"
        quantization = read_stored_quantization(read_object(config), str(config))
        if quantization is not None:
            stored = merge_scales(path, stored, quantization)
        self._stored = of_text_model(stored, FAMILIES[model.family])
        self._dtype, self._model = dtype, model
        self._prefix = next(name.partition("layers.")[0] for name in self._stored if "layers." in name)

    def __contains__(self, name: str) -> bool:
        return name.replace("model.", self._prefix, 1) in self._stored

    def read(self, name: str) -> Tensor:
        """Return a whole parameter or buffer."""
        name = name.replace("model.", self._prefix, 1)
        if name == "lm_head.weight" and name not in self._stored:
            name = "model.embed_tokens.weight"  # tied
        with PieceReader(self._stored) as reader:
            if name not in self._stored:
                return self._joined(name, reader).to(self._dtype)
            index = tuple(slice(0, size) for size in self._stored[name].shape)
            return reader.read(Piece(name, index)).to(self._dtype)

    def _joined(self, name: str, reader: PieceReader) -> Tensor:
        in_layer = IN_LAYER.fullmatch(name)
        if in_layer is None or in_layer[2] not in JOINED:
            raise ValueError(f"{name} is not stored, and no rule makes it")
        number, parameter = int(in_layer[1]), JOINED[in_layer[2]]
        layer = self._model.layers[number]
        rule, place = table_of(self._model, layer)[parameter], Place(self._model, layer, number)
        if not parameter.startswith(EXPERT):
            return torch.cat([reader.read(piece) for piece in rule(place)])
        each = (rule(place._replace(expert=expert)) for expert in range(experts(place)))
        return torch.stack([torch.cat([reader.read(piece) for piece in pieces]) for pieces in each])


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

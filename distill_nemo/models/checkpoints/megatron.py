"""Load weights from Megatron distributed checkpoints (Megatron's, NeMo's and our own), saved at any layout.

Before a tensor is read, names and shapes of the whole model are checked against the checkpoint's table of contents. So
each rank finds every mismatch by itself.
"""

import re
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distill_nemo.fields import first_few
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.families.pieces import EMBEDDING, EXPERT, OUTPUT, OUTSIDE, Piece
from distill_nemo.models.families.tensors import FUSED_NAMES, LOCAL_NAMES, Shapes, parameters
from distill_nemo.models.quantizers.state import check_amaxes, is_amax, with_amaxes
from distill_nemo.models.sources import MODELOPT_STATE
from distill_nemo.runtime.pickles import read_contents, weights_only

PREFIXES = ("", "model.", "module.", "model.module.", "module.module.")  # Megatron, NeMo 1 and ours, NeMo 2, wrapped
# Keys that are not the model's: optimizer states; Transformer Engine's extra states; what ModelOpt's distillation adds.
IGNORED = re.compile(r"^(chained_\d+\.)?optimizer\b|^rng|_extra_state\b|(^|\.)(_teacher_model|_loss_modules)\.")
# Tensors that Megatron stores in parts: the axis of the parts, counted from the end, and their names.
STORED_IN_PARTS = {
    "linear_fc1.weight": (-2, ("_w", "_v")),  # of ModelOpt's quantised MLPs
    "self_attention.in_proj.weight": (-2, (".query", ".key", ".value", ".z", ".beta", ".alpha")),
    "self_attention.conv1d.weight": (-3, (".query", ".key", ".value")),
}
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
MAX_VOCAB_PADDING = 128 * 64  # Megatron pads to a multiple of 128 times the tensor parallel size


def load_megatron_weights(directory: Path, built: GPTModel, quantized: bool = False) -> None:
    """Fill this tensor- and pipeline-parallel part of `built`, resharding as needed.

    Layers may be stored stacked (`decoder.layers.mlp...` with a leading dimension) or one by one, layer norms under
    Transformer Engine's names or under the local layers', keys with or without NeMo's prefixes.

    Args:
        directory: holds `.metadata`, which `check_megatron_tensors` has compared with the model.
        built: model to fill.
        quantized: the checkpoint has the amaxes of the model's quantizers, as our runs store them.

    Raises:
        ValueError: if a file is missing or corrupt, or amaxes are missing or of another shape, by name.
    """
    stored = stored_tensors(directory, quantized)
    prefix = key_prefix(stored)
    names = {name.removeprefix(prefix): shape for name, shape in stored.items() if name.startswith(prefix)}
    metadata = {"non_homogeneous_layers": not _is_stacked(names)}
    by_modelopt = (directory / MODELOPT_STATE).is_dir()
    part = built.sharded_state_dict(prefix=prefix, metadata=metadata)
    if not by_modelopt:
        part = with_amaxes(built, part, prefix)

    def is_stored(name: str) -> bool:
        return not is_extra(name) and (quantized or by_modelopt or not is_amax(name))

    wanted = {name: value for name, value in part.items() if is_stored(name)}
    if quantized:
        check_amaxes(directory, wanted)
    for value in nested_values(wanted):
        value.key = prefix + _stored_name(value.key.removeprefix(prefix), names)
    missing, _ = built.load_state_dict(_read(directory, wanted, prefix), strict=False)
    missing = [name for name in missing if is_stored(name)]
    assert not missing, f"the sharded state of the model leaves out {missing[:3]}"


def is_extra(name: str) -> bool:
    """Return True for Transformer Engine's fp8 state, which is not a tensor. Grouped experts number theirs."""
    return re.search(r"_extra_state\d*$", name) is not None


def key_prefix(stored: Shapes) -> str:
    """Return the prefix of the model's keys."""
    return next((p for p in PREFIXES if any(name.startswith(p + "decoder.") for name in stored)), "")


def stored_tensors(directory: Path, quantized: bool = False) -> Shapes:
    """Return the global shape of every tensor of the checkpoint's model, by name, without those of quantizers.

    Only a checkpoint that one of our runs has quantised (`quantized`), or ModelOpt, may have quantizers.

    Raises:
        ValueError: if the table of contents cannot be read, could run code, or names files that are missing or too
            short.
    """
    contents = read_contents(directory)
    try:
        parts = [(s.relative_path, s.offset + s.length) for s in contents.storage_data.values()]
        tensors = {k: v for k, v in contents.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{directory}/.metadata is corrupt: {error!r:.200}") from None
    ends: dict[str, int] = {}
    for name, end in parts:
        ends[name] = max(end, ends.get(name, 0))
    absent = [name for name in sorted(ends) if not (directory / name).is_file()]
    if absent:
        raise ValueError(f"{directory}/.metadata names files that are not there: {', '.join(first_few(absent))}")
    for name, end in sorted(ends.items()):
        size = (directory / name).stat().st_size
        if size < end:
            raise ValueError(f"{directory / name} is truncated: {size:,} bytes, needs {end:,}")
    may_have_quantizers = quantized or (directory / MODELOPT_STATE).is_dir()
    quantizer = re.compile(r"_quantizer\b" if may_have_quantizers else r"(?!)")
    shapes = {k: tuple(t.size) for k, t in tensors.items() if not IGNORED.search(k) and not quantizer.search(k)}
    for tensor, (axis, parts) in STORED_IN_PARTS.items():
        for name in [name.removesuffix(parts[0]) for name in shapes if name.endswith(tensor + parts[0])]:
            shapes[name] = _joined([shapes.pop(name + part, ()) for part in parts], axis)
    return shapes


def _joined(parts: list[tuple[int, ...]], axis: int) -> tuple[int, ...]:
    """Return the shape of all parts together along an axis, counted from the end; the first one's if they differ."""
    first = parts[0]
    if len({(len(part), part[:axis], part[axis:][1:]) for part in parts}) > 1:
        return first
    return (*first[:axis], sum(part[axis] for part in parts), *first[axis:][1:])


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the embedding's dtype; fp32 if there is none.

    Raises:
        ValueError: if the table of contents could run code.
    """
    tensors = read_contents(directory).state_dict_metadata
    found = (t for name, t in tensors.items() if name.endswith(EMBEDDING) and isinstance(t, TensorStorageMetadata))
    return next((t.properties.dtype for t in found), torch.float32)


def expected_shapes(model: Architecture) -> tuple[list[Shapes], Shapes]:
    """Return the shapes of each layer's tensors, and of those outside the layers, by Transformer Engine's names.

    Experts are stored together, one after another along a first dimension.
    """
    layers: list[Shapes] = [{} for _ in model.layers]
    around: Shapes = {}
    for parameter in parameters(model):
        name, shape = parameter.name, _shape(parameter.pieces)
        if parameter.place.layer is OUTSIDE:
            around[name] = shape
            continue
        fused = FUSED_NAMES.get(name, name)
        if name.startswith(EXPERT):
            assert model.experts is not None
            fused, shape = f"{EXPERT}experts.{name.removeprefix(EXPERT)}", (model.experts.num_experts, *shape)
        elif parameter.place.layer.has_experts and name == "pre_mlp_layernorm.weight":
            fused = name  # the norm before a router is a module of its own
        elif name == "input_layernorm.weight" and parameter.place.layer.mixer in (
            "latent_attention",
            "gated_delta_net",
        ):
            fused = name  # not fused: a latent has two readers
        layers[parameter.place.number][fused] = shape
    return layers, around


def _shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Return the shape that pieces make together, without the padding of the vocabulary."""
    stored = [piece.shape for piece in pieces if piece.name]
    return (sum(shape[0] for shape in stored), *stored[0][1:])


def _is_stacked(names: Shapes) -> bool:
    """Return True if each stored tensor holds all layers."""
    return not any(LAYER.match(name) for name in names)


def check_megatron_tensors(directory: Path, model: Architecture) -> None:
    """Compare the tensors of a checkpoint with those that the architecture needs. Only its table of contents is read.

    Args:
        directory: holds `.metadata`.
        model: with the vocabulary that the checkpoint states.

    Raises:
        ValueError: if tensors are missing, extra or of another shape, or a file is missing or short, by name.
    """
    stored = stored_tensors(directory, model.source is not None and model.source.quantization is not None)
    prefix = key_prefix(stored)
    names = {name.removeprefix(prefix): shape for name, shape in stored.items() if name.startswith(prefix)}
    stray = [name for name in stored if not name.startswith(prefix)]
    by_layer, wanted = expected_shapes(model)
    count = model.num_layers
    deep = _stored_layers(names)
    if deep not in (None, count) and model.block_configs is None:  # a last layer without parts leaves nothing to count
        raise ValueError(f"{directory} does not fit the model: it holds {deep} layers, num_layers = {count}")
    if _is_stacked(names):
        wanted |= {f"decoder.layers.{name}": (count, *shape) for name, shape in by_layer[0].items()}
    else:
        wanted |= {f"decoder.layers.{i}.{name}": s for i, layer in enumerate(by_layer) for name, s in layer.items()}
    wanted = {_stored_name(name, names): shape for name, shape in wanted.items()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in names]
    problems += [f"extra: {name} {names[name]}" for name in names if name not in wanted]
    problems += [f"extra: {name}" for name in stray]
    problems += [
        f"{name} has shape {names[name]}, needs {shape}"
        for name, shape in wanted.items()
        if name in names and not _fits(name, names[name], shape)
    ]
    if problems:
        raise ValueError(f"{directory} does not fit the model:\n  " + "\n  ".join(first_few(problems)))


def _stored_layers(names: Shapes) -> int | None:
    """Return the number of layers in the checkpoint; None if its tensors do not show it."""
    numbers = [int(match[1]) for name in names if (match := LAYER.match(name))]
    if numbers:
        return max(numbers) + 1
    shape = names.get("decoder.layers.self_attention.linear_proj.weight", ())
    return shape[0] if len(shape) == 3 else None


def _stored_name(name: str, names: Shapes) -> str:
    """Return `name`, or the local layers' name if the checkpoint has only that."""
    # The norm before experts is not fused, but Megatron's local layers store it under a fused norm's name.
    for ours, theirs in (LOCAL_NAMES | FUSED_NAMES).items():
        own = name.replace(ours, theirs)
        if own != name and name not in names and own in names:
            return own
    return name


def _fits(name: str, stored: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Return True if the shapes are equal. The vocabulary may be padded to any multiple."""
    if name in (EMBEDDING, OUTPUT) and len(stored) == 2:
        return stored[1] == needed[1] and 0 <= stored[0] - needed[0] < MAX_VOCAB_PADDING
    return stored == needed


def _read(directory: Path, wanted: dict[str, ShardedBase], prefix: str) -> dict[str, Tensor]:
    """Read the tensors alone; the pickles beside them (arguments of Megatron and NeMo) are not opened."""
    sharded, _, factories = load_preprocess(wanted)
    with weights_only(directory):
        loaded = TorchDistLoadShardedStrategy().load(sharded, directory)
    assert isinstance(factories, dict)
    loaded = apply_factory_merges(loaded, factories)
    return {name.removeprefix(prefix): loaded[name] for name in wanted}

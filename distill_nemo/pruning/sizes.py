"""Sizes that a model can be cut to, and the architecture and config.json of the result."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distill_nemo.checks import PRUNED_SIZES
from distill_nemo.config import PruneConfig, StudentConfig
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.families.huggingface import to_huggingface
from distill_nemo.models.resolve import resolve
from distill_nemo.models.sources import CheckpointKind

Sizes = dict[str, int]  # by field of `PruneConfig`: all sizes that a model has
LayersOf = Callable[[int], Sequence[int]]  # from a number of layers to those that stay

WIDTHS = ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size")
TENSOR_CORES = 64  # widths that are multiples of this fill the tiles of matrix products
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in config.json
BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "hybrid_override_pattern")


def check_prunable(model: Architecture) -> None:
    """Refuse a model of which no part can be written back.

    Raises:
        ValueError: with the reason, and what to do.
    """
    source = model.source
    require(
        source is not None and source.kind is CheckpointKind.HUGGING_FACE,
        f"model = {model.name}: only Hugging Face directories are pruned; write one with `nemo distill export` first",
    )
    require(model.block_configs is None, f"model = {model.name}: layers of different sizes (block_configs) are not cut")


def sizes_of(model: Architecture) -> Sizes:
    """Return the sizes that can be cut. A model without experts has none of theirs."""
    sizes = {"num_layers": model.num_layers, "hidden_size": model.hidden_size}
    if any(layer.ffn_hidden_size and not layer.has_experts for layer in model.layers):
        sizes["ffn_hidden_size"] = model.ffn_hidden_size
    if any(layer.num_query_groups or layer.mixer == "latent_attention" for layer in model.layers):
        sizes["num_attention_heads"] = model.num_attention_heads
    if any(layer.num_query_groups for layer in model.layers):
        sizes["num_query_groups"] = model.num_query_groups
    if model.experts is not None:
        sizes["num_experts"] = model.experts.num_experts
        sizes["moe_ffn_hidden_size"] = model.experts.moe_ffn_hidden_size
    if model.mamba is not None and any(layer.mixer == "mamba" for layer in model.layers):
        sizes["mamba_num_heads"] = model.mamba.num_heads
    return sizes


def given_sizes(config: PruneConfig) -> Sizes:
    """Return the sizes that the config states."""
    return {name: value for name in PRUNED_SIZES if (value := vars(config)[name]) is not None}


def complete(model: Architecture, given: Sizes) -> Sizes:
    """Return all sizes of the result: those given, and the model's own.

    Raises:
        ValueError: for sizes that cannot be had, with all that can.
    """
    own = sizes_of(model)
    for name, value in given.items():
        require(name in own, f"{name} = {value}: {_absent(model, name)}{_possible(model)}")
        require(1 <= value <= own[name], f"{name} = {value} is not possible.{_possible(model)}")
    sizes = own | given
    if "num_query_groups" in own:
        heads, groups = _heads(model, given)
        require(
            heads % groups == 0 and heads // groups <= _heads_of_group(model),
            f"num_attention_heads = {heads} with num_query_groups = {groups} is not possible.{_possible(model)}",
        )
        sizes |= {"num_attention_heads": heads, "num_query_groups": groups}
    if model.experts is not None:
        count, least = sizes["num_experts"], model.experts.num_experts_per_tok
        fits = count >= least and count % model.experts.num_groups == 0
        require(fits, f"num_experts = {count} is not possible.{_possible(model)}")
    if model.mamba is not None and "mamba_num_heads" in own:
        count = sizes["mamba_num_heads"]
        require(count % model.mamba.num_groups == 0, f"mamba_num_heads = {count} is not possible.{_possible(model)}")
    return sizes


def odd_widths(sizes: Sizes, model: Architecture) -> str:
    """Return a warning of widths on which tensor cores are slow, or an empty text."""
    own = sizes_of(model)
    odd = [f"{name} = {sizes[name]}" for name in WIDTHS if name in sizes and sizes[name] != own[name]]
    odd = [each for each in odd if int(each.split()[-1]) % TENSOR_CORES]
    return f"warning: {', '.join(odd)}: not a multiple of {TENSOR_CORES}, which tensor cores like" if odd else ""


def _heads(model: Architecture, given: Sizes) -> tuple[int, int]:
    """Return heads and groups. Groups keep all their heads unless the number of heads is given."""
    groups = given.get("num_query_groups", model.num_query_groups)
    return given.get("num_attention_heads", groups * _heads_of_group(model)), groups


def _heads_of_group(model: Architecture) -> int:
    return model.num_attention_heads // model.num_query_groups


def _absent(model: Architecture, name: str) -> str:
    if name == "num_query_groups" and model.latent is not None:
        return "latent attention has no groups; num_attention_heads cuts its heads."
    if name == "ffn_hidden_size" and model.experts is not None:
        return f"{model.name} has experts in every layer; moe_ffn_hidden_size cuts them."
    return f"{model.name} has none."


def _possible(model: Architecture) -> str:
    """Return one line for each size of the model, with the values that it can have."""
    own = sizes_of(model)
    rows = {name: f"1 to {value}" for name, value in own.items()}
    if "num_query_groups" in own:
        each = _heads_of_group(model)
        most = f" to {each}" if each > 1 else ""
        rows["num_attention_heads"] = f"num_query_groups times 1{most}: heads stay in their group"
    if model.experts is not None:
        experts = model.experts
        groups = f", a multiple of its {experts.num_groups} groups" if experts.num_groups > 1 else ""
        rows["num_experts"] = f"{experts.num_experts_per_tok} (of a token) to {experts.num_experts}{groups}"
    if model.mamba is not None and "mamba_num_heads" in own:
        rows["mamba_num_heads"] += f", a multiple of its {model.mamba.num_groups} groups"
    return f"\n{model.name} can be cut to:\n" + "\n".join(f"  {name:20} {text}" for name, text in rows.items())


def evenly_spaced(model: Architecture, count: int) -> list[int]:
    """Return layers of all parts of a model, in place of those that scores will choose."""
    return [i * model.num_layers // count for i in range(count)]


def smaller(model: Architecture, sizes: Sizes, layers: Sequence[int]) -> Architecture:
    """Return the architecture of `model` cut to `sizes`, with these of its layers. It has no source.

    Raises:
        ValueError: if the family cannot state it.
    """
    values: dict[str, Any] = dict(sizes)
    fields = _own_fields(model, layers) | {name: values.pop(name) for name in ("mamba_num_heads",) if name in values}
    if model.experts is not None and "ffn_hidden_size" not in sizes:
        if model.ffn_hidden_size == model.experts.moe_ffn_hidden_size:  # one field states both
            values["ffn_hidden_size"] = sizes["moe_ffn_hidden_size"]
    if model.latent is not None:
        values["num_query_groups"] = sizes["num_attention_heads"]
    stated = replace(model.filled(StudentConfig()), family_fields=fields, **values)
    cut = resolve(stated)
    for number, layer in zip(layers, cut.layers, strict=True):
        sized = {"num_query_groups": layer.num_query_groups, "ffn_hidden_size": layer.ffn_hidden_size}
        require(
            replace(model.layers[number], **sized) == layer,
            f"{model.name}: family {model.family} states its layers by a rule that layers {list(layers)} break",
        )
    return replace(cut, name=model.name)


def _own_fields(model: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """Return the family's own fields for some of the layers."""
    own = {**model.family_fields, **_of_layers(model.family_fields, model.num_layers, layers)}
    if own.get("mlp_only_layers"):
        own["mlp_only_layers"] = [i for i, number in enumerate(layers) if number in own["mlp_only_layers"]]
    if own.get("first_k_dense_replace"):
        own["first_k_dense_replace"] = sum(number < own["first_k_dense_replace"] for number in layers)
    return own


def _of_layers(fields: dict[str, Any], count: int, layers: Sequence[int]) -> dict[str, Any]:
    """Return the fields with an entry for each layer, cut to some layers."""
    found = {name: fields[name] for name in BY_LAYER if fields.get(name) and len(fields[name]) == count}
    return {
        name: "".join(value[i] for i in layers) if isinstance(value, str) else [value[i] for i in layers]
        for name, value in found.items()
    }


def with_source(model: Architecture, cut: Architecture, layers: Sequence[int]) -> Architecture:
    """Give `cut` the source of `model`, with the fields of its config.json changed that differ."""
    assert model.source is not None
    before, after = to_huggingface(model, torch.float32), to_huggingface(cut, torch.float32)
    config = model.source.config | {name: value for name, value in after.items() if value != before.get(name)}
    config |= _of_layers(model.source.config, model.num_layers, layers)
    if cut.experts is not None:
        config |= {name: cut.experts.num_experts for name in NUM_EXPERTS if config.get(name) is not None}
    if "mamba_d_head" in config and "mamba_d_head" in after:
        config["mamba_d_head"] = after["mamba_d_head"]  # transformers states what it derives from hidden_size
    if "mlp_layer_types" in config and config.get("first_k_dense_replace") is not None:
        config["first_k_dense_replace"] = config["mlp_layer_types"].count("dense")
    return replace(cut, source=replace(model.source, config=config, tensors={}))


def predicted(model: Architecture, sizes: Sizes) -> Architecture:
    """Return the result of a cut before scores have chosen its layers."""
    layers = evenly_spaced(model, sizes["num_layers"])
    return with_source(model, smaller(model, sizes, layers), layers)

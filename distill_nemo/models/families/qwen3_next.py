"""Qwen3-Next: gated delta nets in three of four layers, experts and a shared one, or an MLP."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.delta_net import (
    IN_PROJECTION,
    LINEAR,
    DeltaNetExperts,
    delta_heads,
    delta_keys,
    delta_net,
    delta_net_table,
    delta_values,
    refused,
    settings,
    with_delta_nets,
)
from distill_nemo.models.families.experts import (
    SparseStep,
    read_experts,
    with_gated_shared_expert,
    with_sparse_step,
    write_experts,
)
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import Axes, Piece, Place, SizedRule, Table, clip, hidden, piece_of

QKVZ, BA = LINEAR + "in_proj_qkvz.weight", LINEAR + "in_proj_ba.weight"


@dataclass(frozen=True)
class _OwnFields(DeltaNetExperts, SparseStep):
    """Delta nets, a shared expert, and layers without experts."""


def _in_projection(place: Place) -> list[Piece]:
    """Return the rows of a delta net's first product, section by section. transformers stores them by key head.

    A key head has its query, its key, and values and gates of its value heads; and their write strengths and decays.
    """
    net, width = place.model.delta_net, (0, place.model.hidden_size)
    assert net is not None
    each = net.linear_num_value_heads // net.linear_num_key_heads
    key, values = net.linear_key_head_dim, each * net.linear_value_head_dim
    own = []
    for tensor, sizes in ((QKVZ, (key, key, values, values)), (BA, (each, each))):
        for i, size in enumerate(sizes):
            starts = [sum(sizes) * head + sum(sizes[:i]) for head in range(net.linear_num_key_heads)]
            own += clip([piece_of(tensor, place, (start, start + size), width) for start in starts], place)
    return own


def mixed(place: Place) -> int:
    """Return the rows of queries, keys, values and gates, which alternate by key head."""
    return 2 * (delta_keys(place) + delta_values(place))


def mixed_heads(place: Place) -> int:
    """Return the rows of write strengths and decays, which alternate by key head."""
    return 2 * delta_heads(place)


AXES: Axes = {QKVZ: ((mixed,), (hidden,)), BA: ((mixed_heads,), (hidden,))}


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return with_delta_nets(values, with_sparse_step(values, layers))


def _layer_table(model: Architecture, layer: Layer) -> Table:
    own = {IN_PROJECTION: SizedRule(_in_projection, AXES)} if layer.mixer == "gated_delta_net" else {}
    return delta_net_table(model, layer) | own


QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "norm_topk_prob": True,
    },
    qk_norm=True,
    output_gate=True,
    partial_rotary=0.25,
    own_fields=_OwnFields,
    experts=with_gated_shared_expert,
    layers=_layers,
    delta_net=delta_net,
    settings=settings,
    refused=refused,
    read_own=read_experts,
    write_own=write_experts,
    layer_table=_layer_table,
    ignored_tensors=("mtp.",),
)

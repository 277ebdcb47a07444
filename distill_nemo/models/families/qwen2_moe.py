"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 whose MLPs are mixtures of experts, beside one for every token, in some layers."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.experts import (
    GatedSharedExpert,
    read_experts,
    with_gated_shared_expert,
    with_sparse_step,
    write_experts,
)
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import SHARED_GATE, Table, layer_table, shared_experts


@dataclass(frozen=True)
class _Fields(GatedSharedExpert):
    """Dense layers, the shared expert, and a bias of queries, keys and values."""

    qkv_bias: bool = True


def _traits(values: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": values["family_fields"]["qkv_bias"]}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | (shared_experts("shared_expert") | SHARED_GATE if layer.has_experts else {})


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 16},
    own_fields=_Fields,
    traits=_traits,
    experts=with_gated_shared_expert,
    layers=with_sparse_step,
    read_own=read_experts,
    write_own=write_experts,
    layer_table=_layer_table,
)

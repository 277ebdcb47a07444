"""GLM-4.5, 4.6 and 4.7: experts behind a sigmoid router, dense layers first, partial rotary embeddings."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.experts import DenseFirst, dense_first, read_experts, sigmoid_experts, write_experts
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import Table, layer_table, shared_experts


@dataclass(frozen=True)
class Glm4MoeFields(DenseFirst):
    """Routing, and what attention has."""

    attention_bias: bool = False
    use_qk_norm: bool = False


def _traits(values: dict[str, Any]) -> dict[str, Any]:
    own = values["family_fields"]
    return {"qkv_bias": own["attention_bias"], "qk_norm": own["use_qk_norm"]}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | (shared_experts("shared_experts") if layer.has_experts else {})


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": True,
    },
    partial_rotary=0.5,
    own_fields=Glm4MoeFields,
    traits=_traits,
    experts=sigmoid_experts,
    layers=dense_first,
    read_own=partial(read_experts, count="n_routed_experts"),
    write_own=partial(write_experts, count="n_routed_experts"),
    layer_table=_layer_table,
)

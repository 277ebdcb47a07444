"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, rotary embeddings of a part of the channels, and longrope."""

from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import (
    LAYER,
    SELF,
    Table,
    gated_in_one,
    hidden,
    layer_table,
    query_key_value_in_one,
)
from distill_nemo.models.families.windows import OptionalWindow, with_windows

FUSED: Table = {
    "self_attention.linear_qkv.weight": query_key_value_in_one(SELF + "qkv_proj.weight", hidden),
    "mlp.linear_fc1.weight": gated_in_one(LAYER + "mlp.gate_up_proj.weight"),
}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return {name: FUSED.get(name, rule) for name, rule in layer_table(model, layer).items()}


def _write(model: Architecture) -> dict[str, Any]:
    """Write longrope in three fields, as transformers 4 requires: it refuses more."""
    own: dict[str, Any] = {"pad_token_id": None}  # else 32000, for which a small vocabulary has no row
    (rope,) = model.ropes
    if rope.rope_type == "longrope" and rope.factor is None and rope.attention_factor is None:
        factors = {name: rope.stated[name] for name in ("short_factor", "long_factor")}
        own["rope_scaling"] = {"type": "longrope", **factors}
    return own


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    # Names of longrope in older directories. transformers 5 opens those that state the original length in rope_scaling.
    rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    partial_rotary=1.0,
    own_fields=OptionalWindow,
    layers=with_windows,
    write_own=_write,
    layer_table=_layer_table,
)

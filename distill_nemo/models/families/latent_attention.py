"""Multi-head latent attention, as model families state it in `config.json`."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Architecture, Latent, Layer, RopeType
from distill_nemo.models.config_fields import MAX_SIZE, Fields
from distill_nemo.models.families.family import OwnFields
from distill_nemo.models.families.pieces import (
    ATTENTION,
    SELF,
    Place,
    Table,
    column_parallel,
    hidden,
    layer_table,
    replicated,
    row_parallel,
)

# With other types, transformers reads a `mscale_all_dim` that they do not have.
ROPE_TYPES: dict[str, RopeType] = {"default": "default", "yarn": "yarn"}


@dataclass(frozen=True)
class LatentFields(OwnFields):
    """Sizes of latent attention, with DeepSeek-V3's defaults. `ModelConfig.kv_channels` is its `v_head_dim`."""

    q_lora_rank: int | None = setting(1536, "null: queries without a latent", at_least=1, at_most=MAX_SIZE)
    kv_lora_rank: int = setting(512, at_least=1, at_most=MAX_SIZE)
    qk_nope_head_dim: int = setting(128, "channels that are not rotated", at_least=1, at_most=MAX_SIZE)
    qk_rope_head_dim: int = setting(64, "channels that are rotated", at_least=2, at_most=MAX_SIZE)
    rope_interleave: bool | None = True

    def resolved(self, values: dict[str, Any]) -> Self:
        """Refuse query groups, layers that differ in size, and an odd number of rotated channels."""
        heads, groups = values["num_attention_heads"], values["num_query_groups"]
        require(
            heads == groups,
            f"num_query_groups = {groups} must be num_attention_heads = {heads}: latent attention has a key for each",
        )
        require(values["block_configs"] is None, "block_configs: not supported with latent attention")
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even")
        return replace(super().resolved(values), rope_interleave=bool(self.rope_interleave))


def latent_of(values: dict[str, Any]) -> Latent:
    """Return the sizes of latent attention (`Family.latent`)."""
    own = values["family_fields"]
    return Latent(**{name: own[name] for name in Latent.__dataclass_fields__})


def with_latent_attention(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers with latent attention."""
    return tuple(replace(layer, num_query_groups=None, mixer="latent_attention") for layer in layers)


def value_width(config: Fields) -> dict[str, Any]:
    """Return the channels of a head's values as `head_dim`, where transformers repeats `qk_rope_head_dim`."""
    return {"head_dim": config.integer("v_head_dim")}


def write_latent(model: Architecture) -> dict[str, Any]:
    """Return the widths of a head, for transformers 4 and 5."""
    assert model.latent is not None
    return {"v_head_dim": model.kv_channels, "head_dim": model.latent.qk_rope_head_dim}


def latent_settings(model: Architecture) -> dict[str, Any]:
    """Return the factor of the scores: `1 / sqrt(qk_head_dim)`, and with yarn the square of a factor of its own."""
    assert model.latent is not None
    (rope, *_), scale = model.ropes, model.latent.qk_head_dim**-0.5
    if rope.mscale_all_dim is not None and rope.factor is not None:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2
    return {"softmax_scale": scale}


def latent_table(model: Architecture, layer: Layer) -> Table:
    """Return the table of one layer, without shared experts."""
    assert model.latent is not None
    queries = QUERIES if model.latent.q_lora_rank is None else QUERIES_WITH_LATENT
    return LATENT_ATTENTION | queries | layer_table(model, layer)


def _latent(place: Place) -> Latent:
    assert place.model.latent is not None
    return place.model.latent


def query_rank(place: Place) -> int:
    """Return the width of the queries' latent."""
    return _latent(place).q_lora_rank or 0


def latent_queries(place: Place) -> int:
    """Return the channels of all queries."""
    return place.model.num_attention_heads * _latent(place).qk_head_dim


def latent_values(place: Place) -> int:
    """Return the channels of all values."""
    return place.model.num_attention_heads * place.model.kv_channels


def key_rank(place: Place) -> int:
    """Return the width of the latent of keys and values."""
    return _latent(place).kv_lora_rank


def key_rank_and_rope(place: Place) -> int:
    """Return the width of that latent, and the key's rotated channels."""
    return key_rank(place) + _latent(place).qk_rope_head_dim


def latent_keys_values(place: Place) -> int:
    """Return the channels of keys that are not rotated, and of values, which alternate by head."""
    return place.model.num_attention_heads * (_latent(place).qk_nope_head_dim + place.model.kv_channels)


MEGATRON = "self_attention."
LATENT_ATTENTION: Table = {
    "input_layernorm.weight": ATTENTION["input_layernorm.weight"],
    MEGATRON + "linear_kv_down_proj.weight": replicated(SELF + "kv_a_proj_with_mqa.weight", key_rank_and_rope, hidden),
    MEGATRON + "kv_layernorm.weight": replicated(SELF + "kv_a_layernorm.weight", key_rank),
    MEGATRON + "linear_kv_up_proj.weight": column_parallel(SELF + "kv_b_proj.weight", latent_keys_values, key_rank),
    MEGATRON + "linear_proj.weight": row_parallel(SELF + "o_proj.weight", hidden, latent_values),
}
QUERIES: Table = {MEGATRON + "linear_q_proj.weight": column_parallel(SELF + "q_proj.weight", latent_queries, hidden)}
QUERIES_WITH_LATENT: Table = {
    MEGATRON + "linear_q_down_proj.weight": replicated(SELF + "q_a_proj.weight", query_rank, hidden),
    MEGATRON + "q_layernorm.weight": replicated(SELF + "q_a_layernorm.weight", query_rank),
    MEGATRON + "linear_q_up_proj.weight": column_parallel(SELF + "q_b_proj.weight", latent_queries, query_rank),
}

"""DeepSeek-V3 and R1, Moonlight, Kimi-K2: latent attention, experts behind a sigmoid router, dense layers first."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_nemo.fields import setting
from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import MAX_EXPERTS, MAX_LAYERS, MAX_NUMBER, Fields, shown
from distill_nemo.models.families.experts import DenseFirst, dense_first, read_experts, sigmoid_experts, write_experts
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.latent_attention import (
    ROPE_TYPES,
    LatentFields,
    latent_of,
    latent_settings,
    latent_table,
    value_width,
    with_latent_attention,
    write_latent,
)
from distill_nemo.models.families.pieces import Table, shared_experts

ALONE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}  # transformers reads none of them


@dataclass(frozen=True)
class DeepseekV3Fields(LatentFields, DenseFirst):
    """Latent attention and routing, with DeepSeek-V3's defaults."""

    n_group: int = setting(8, "groups of experts", at_least=1, at_most=MAX_EXPERTS)
    topk_group: int = setting(4, "groups that a token's experts are chosen from", at_least=1, at_most=MAX_EXPERTS)
    routed_scaling_factor: float = setting(2.5, "of the experts' weights", above=0, at_most=MAX_NUMBER)
    first_k_dense_replace: int = setting(3, "first layers without experts", at_least=0, at_most=MAX_LAYERS)


def _refused(config: Fields) -> dict[str, bool]:
    stated = {name: config.values.get(name) for name in ALONE}
    return {
        f"{name} {shown(value)}": value is not None and (type(value), value) != (type(ALONE[name]), ALONE[name])
        for name, value in stated.items()
    }


def _write(model: Architecture) -> dict[str, Any]:
    """Return its fields of `config.json`. By default, transformers would have a layer that predicts a further token."""
    return write_experts(model, "n_routed_experts") | write_latent(model) | {"num_nextn_predict_layers": 0}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return latent_table(model, layer) | (shared_experts("shared_experts") if layer.has_experts else {})


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    other_types=("kimi_k2",),  # which transformers does not know; exports are of DeepSeek's type
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 128,
        "v_head_dim": 128,
        "norm_topk_prob": True,
    },
    rope_types=ROPE_TYPES,
    own_fields=DeepseekV3Fields,
    spelled=value_width,
    refused=_refused,
    latent=latent_of,
    experts=sigmoid_experts,
    layers=lambda values, layers: with_latent_attention(dense_first(values, layers)),
    settings=latent_settings,
    read_own=partial(read_experts, count="n_routed_experts"),
    write_own=_write,
    layer_table=_layer_table,
)

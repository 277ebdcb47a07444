"""GLM-4.7-Flash: DeepSeek-V3 whose config states for each layer whether it has experts."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Layer
from distill_nemo.models.config_fields import MAX_NUMBER, MAX_SIZE, Fields, shown
from distill_nemo.models.families.deepseek_v3 import DEEPSEEK_V3
from distill_nemo.models.families.experts import SigmoidRouter, with_dense_layers
from distill_nemo.models.families.latent_attention import LatentFields, with_latent_attention

MlpType = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Glm4MoeLiteFields(LatentFields, SigmoidRouter):
    """Latent attention, routing, and a type for each MLP."""

    q_lora_rank: int | None = setting(768, "null: queries without a latent", at_least=1, at_most=MAX_SIZE)
    qk_nope_head_dim: int = setting(192, "channels that are not rotated", at_least=1, at_most=MAX_SIZE)
    routed_scaling_factor: float = setting(1.8, "of the experts' weights", above=0, at_most=MAX_NUMBER)
    mlp_layer_types: list[MlpType] | None = None

    def resolved(self, values: dict[str, Any]) -> "Glm4MoeLiteFields":
        """Fill in `mlp_layer_types`: all but the first layer have experts. Refuse a model without experts."""
        count, types = values["num_layers"], self.mlp_layer_types
        if types is None:
            types = ["dense", *["sparse"] * (count - 1)]
        require(len(types) == count, f"mlp_layer_types has {len(types)} entries, num_layers = {count}")
        require("sparse" in types, "mlp_layer_types leaves no layer with experts")
        return replace(super().resolved(values), mlp_layer_types=types)


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    types = values["family_fields"]["mlp_layer_types"]
    dense = [i for i, kind in enumerate(types) if kind == "dense"]
    return with_latent_attention(with_dense_layers(values, layers, dense))


def _refused(config: Fields) -> dict[str, bool]:
    types, dense = config.values.get("mlp_layer_types"), config.values.get("first_k_dense_replace")
    count = types.count("dense") if isinstance(types, list) else 1
    ignored = dense is not None and dense != count
    return DEEPSEEK_V3.refused(config) | {f"first_k_dense_replace {shown(dense)} (transformers ignores it)": ignored}


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    hf_class="Glm4MoeLiteForCausalLM",
    defaults={
        "max_position_embeddings": 202752,
        "num_key_value_heads": 20,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": True,
    },
    own_fields=Glm4MoeLiteFields,
    refused=_refused,
    layers=_layers,
)

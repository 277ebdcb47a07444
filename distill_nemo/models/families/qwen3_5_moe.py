"""Qwen3.5 and 3.6 with experts: gated delta nets in three of four layers, experts and a shared one in all."""

from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.delta_net import (
    DeltaNetExperts,
    delta_net,
    delta_net_table,
    refused,
    settings,
    with_delta_nets,
)
from distill_nemo.models.families.experts import read_experts, with_gated_shared_expert, write_experts
from distill_nemo.models.families.family import Family, Wrapper


def _refused(config: Fields) -> dict[str, bool]:
    normalised = config.values.get("norm_topk_prob")
    return {
        **refused(config),
        f"norm_topk_prob {normalised} (transformers ignores it)": normalised not in (None, True),
    }


QWEN3_5_MOE_TEXT = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "norm_topk_prob": True,
    },
    spelled=lambda config: {"intermediate_size": config.values.get("moe_intermediate_size")},  # no layer has an MLP
    qk_norm=True,
    output_gate=True,
    partial_rotary=0.25,
    own_fields=DeltaNetExperts,
    experts=with_gated_shared_expert,
    layers=with_delta_nets,
    delta_net=delta_net,
    settings=settings,
    refused=_refused,
    read_own=read_experts,
    write_own=write_experts,
    layer_table=delta_net_table,
    wrapper=Wrapper("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "model.language_model."),
    ignored_tensors=("mtp.", "model.visual."),
)

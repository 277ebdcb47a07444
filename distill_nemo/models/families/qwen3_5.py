"""Qwen3.5, dense: gated delta nets in three of four layers, gated attention in the fourth."""

from distill_nemo.models.families.delta_net import (
    DeltaNetFields,
    delta_net,
    delta_net_table,
    refused,
    settings,
    with_delta_nets,
)
from distill_nemo.models.families.family import Family, Wrapper

QWEN3_5_TEXT = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    qk_norm=True,
    output_gate=True,
    partial_rotary=0.25,
    own_fields=DeltaNetFields,
    layers=with_delta_nets,
    delta_net=delta_net,
    settings=settings,
    refused=refused,
    layer_table=delta_net_table,
    wrapper=Wrapper("qwen3_5", "Qwen3_5ForConditionalGeneration", "model.language_model."),
    ignored_tensors=("mtp.", "model.visual."),
)

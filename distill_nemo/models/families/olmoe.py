"""OLMoE: mixtures of experts in every layer, queries and keys normalised as a whole."""

from functools import partial
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families.experts import read_experts, write_experts
from distill_nemo.models.families.family import Family, softmax_experts
from distill_nemo.models.families.pieces import WIDE_QK_NORM, Table, layer_table


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | WIDE_QK_NORM


def _write(model: Architecture) -> dict[str, Any]:
    return write_experts(model, width="intermediate_size") | {"pad_token_id": None}  # else 1, whatever the tokenizer


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    qk_norm=True,
    wide_qk_norm=True,
    refused=lambda config: {"clip_qkv": config.values.get("clip_qkv") is not None},
    experts=softmax_experts,
    read_own=partial(read_experts, width="intermediate_size"),
    write_own=_write,
    layer_table=_layer_table,
)

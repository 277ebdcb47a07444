"""Hugging Face `config.json` <-> `ModelConfig`."""

from pathlib import Path
from typing import Any

import torch

from distill_nemo.config import ModelConfig, near
from distill_nemo.models.experts import MOE_FAMILIES, MOE_FIELDS
from distill_nemo.models.nemo_config import LLAMA3_ROPE

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
QK_NORM_FAMILIES = ("qwen3", "qwen3_moe")
HF_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def from_huggingface(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """`ModelConfig` fields out of a Hugging Face config.

    Raises:
        ValueError: for a model type or a feature that is not supported, by name.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f'{where}: model_type "{family}" is not supported.{near(str(family), FAMILIES)}')
    _check_sizes(config, HF_SIZES, where)
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps what rope_theta and rope_scaling were
    named = config.get("architectures") or []
    refused = {
        f"architectures {named}": named != [FAMILIES[family]],  # the importer goes by it
        "attention_bias": config.get("attention_bias") and family != "qwen2",
        "mlp_bias": config.get("mlp_bias"),
        "sliding window attention": config.get("use_sliding_window"),
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
    }
    for feature, used in refused.items():
        if used:
            raise ValueError(f"{where}: {feature} is not supported")
    scaling = config.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = None
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return {
        "family": family,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": width,
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or width // heads,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config.get("max_position_embeddings") or 4096,
        "rotary_base": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "norm_epsilon": config.get("rms_norm_eps") or 1e-6,
        "tie_word_embeddings": config.get("tie_word_embeddings") or False,
        "block_configs": None,
        **_experts_from(config, where),
    }


def _check_sizes(config: dict[str, Any], names: tuple[str, ...], where: Path) -> None:
    for name in names:
        if type(config.get(name)) is not int or config[name] < 1:
            raise ValueError(f"{where}/config.json: {name} must be a positive integer, got {config.get(name)!r}")


def _experts_from(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The experts, which transformers counts under `num_experts` up to 4 and `num_local_experts` from 5 on."""
    if config["model_type"] not in MOE_FAMILIES:
        return dict.fromkeys(MOE_FIELDS)
    config = config | {"num_experts": config.get("num_experts", config.get("num_local_experts"))}
    _check_sizes(config, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"), where)
    for name, every in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.get(name) or every) != every:
            raise ValueError(
                f"{where}: {name} = {config[name]} is not supported: every layer must have experts ({name} = {every})"
            )
    return {
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    """Refuse all but what Megatron-Core computes, by name."""
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise ValueError(f'rope_scaling type "{kind}" is not supported; "llama3" is')
    for name, value in LLAMA3_ROPE.items():
        if scaling.get(name) != value:
            raise ValueError(f"rope_scaling.{name} = {scaling.get(name)}: Megatron-Core knows {value} only")
    if not isinstance(scaling.get("factor"), int | float):
        raise ValueError(f"rope_scaling.factor must be a number, got {scaling.get('factor')!r}")


def to_huggingface(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of the exported model."""
    assert model.family is not None and model.rotary_base is not None, "resolved"
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": "default", **(model.rope_scaling or {})}
    return {
        "architectures": [FAMILIES[model.family]],
        "model_type": model.family,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": model.rope_scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": None,  # else LlamaConfig takes 1 and 2, whatever the tokenizer, and generation stops at 2
        "eos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        **_experts_to(model),
    }


def _experts_to(model: ModelConfig) -> dict[str, Any]:
    if model.num_experts is None:
        return {}
    return {
        "num_experts": model.num_experts,  # transformers 5 reads it as num_local_experts
        "num_experts_per_tok": model.num_experts_per_tok,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": model.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }

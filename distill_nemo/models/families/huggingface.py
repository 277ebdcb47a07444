"""Hugging Face `config.json` <-> `ModelConfig`."""

from pathlib import Path
from typing import Any

import torch

from distill_nemo.config import ModelConfig
from distill_nemo.fields import near
from distill_nemo.models.checkpoints.config_fields import MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, Fields, shown
from distill_nemo.models.families.rope import read_rope
from distill_nemo.models.layers.experts import MOE_FAMILIES, MOE_FIELDS

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MAX_LABELS = 100_000
QK_NORM_FAMILIES = ("qwen3", "qwen3_moe")
# Values that a config.json leaves out, where the classes of transformers differ; a null has another meaning.
ABSENT = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4},
}


def from_huggingface(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a Hugging Face config.

    Args:
        config: what config.json holds, unchecked.
        where: its directory, for messages.

    Raises:
        ValueError: for a model type or a feature that is not supported, and a value of the wrong kind, by name.
    """
    fields = Fields(config, str(where / "config.json"))
    family = fields.text("model_type")
    if family not in FAMILIES:
        raise ValueError(f'{fields.where}: model_type "{family:.40}" is not supported.{near(family, FAMILIES)}')
    fields = Fields(ABSENT[family] | config, fields.where)
    _refuse_features(family, fields)
    fields.integer("num_labels", 2, most=MAX_LABELS)  # transformers names each one as soon as it opens the file
    heads = fields.integer("num_attention_heads")
    base, scaling = read_rope(fields)
    return {
        "family": family,
        "num_layers": fields.integer("num_hidden_layers", most=MAX_LAYERS),
        "hidden_size": fields.integer("hidden_size"),
        "ffn_hidden_size": fields.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": fields.integer("num_key_value_heads", heads),
        "kv_channels": _head_dim(fields),
        "vocab_size": fields.integer("vocab_size"),
        "max_position_embeddings": fields.integer(
            "max_position_embeddings", ABSENT[family]["max_position_embeddings"], most=MAX_POSITIONS
        ),
        "rotary_base": base,
        "rope_scaling": scaling,
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "block_configs": None,
        **_experts_from(family, fields),
    }


def _refuse_features(family: str, fields: Fields) -> None:
    """Refuse what would be computed otherwise than by transformers."""
    config = fields.values
    named, kinds = config.get("architectures"), config.get("layer_types")
    if named and named != [FAMILIES[family]]:
        raise ValueError(
            f'{fields.where}: architectures {shown(named)} is not supported; with model_type "{family}" it must be '
            f'["{FAMILIES[family]}"], null or absent'
        )
    activation = fields.text("hidden_act", "silu")
    refused = {
        "attention_bias": family != "qwen2" and fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
        "sliding window attention (use_sliding_window)": fields.flag("use_sliding_window"),
        f"sliding window attention (layer_types {shown(kinds)})": not _all_full_attention(kinds),
        f"hidden_act {activation}": activation != "silu",
        "quantization_config": bool(config.get("quantization_config")),
    }
    for feature, used in refused.items():
        if used:
            advice = "; write its weights out dequantised" if feature == "quantization_config" else ""
            raise ValueError(f"{fields.where}: {feature} is not supported{advice}")


def _all_full_attention(kinds: Any) -> bool:
    return kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))


def _head_dim(fields: Fields) -> int:
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if fields.values.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{fields.where}: hidden_size = {width} is not divisible by num_attention_heads = {heads}; state head_dim"
        )
    return fields.integer("head_dim", width // heads)


def _experts_from(family: str, fields: Fields) -> dict[str, Any]:
    """Fields of the experts, which transformers counts under `num_experts` or, from 5 on, `num_local_experts`."""
    if family not in MOE_FAMILIES:
        return dict.fromkeys(MOE_FIELDS)
    config = fields.values
    for name, every in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.get(name) or every) != every:
            raise ValueError(
                f"{fields.where}: {name} = {shown(config[name])} is not supported: every layer must have experts "
                f"({name} = {every})"
            )
    count = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    if config.get(count) is None:
        raise fields.wrong("num_experts", "a positive integer")
    return {
        "num_experts": fields.integer(count, most=MAX_EXPERTS),
        "num_experts_per_tok": fields.integer("num_experts_per_tok", most=MAX_EXPERTS),
        "moe_ffn_hidden_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.flag("norm_topk_prob"),
    }


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
        "torch_dtype": str(dtype).removeprefix("torch."),  # its name in transformers 4
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

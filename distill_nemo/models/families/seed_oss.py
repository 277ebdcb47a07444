"""Seed-OSS: Llama with a bias of queries, keys and values, and heads of 128 channels by default.

`attention_dropout` and `residual_dropout` are not read: no model is trained with dropout here.
"""

from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.family import Family


def _refused(config: Fields) -> dict[str, bool]:
    """Refuse biases that differ from Qwen2's. The output projection's bias has its own field."""
    return {
        "attention_bias = false": not config.flag("attention_bias"),
        "attention_out_bias": config.flag("attention_out_bias"),
    }


SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    defaults={
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
    },
    qkv_bias=True,
    refused=_refused,
    write_own=lambda model: {"pad_token_id": None},  # else 1, whatever the tokenizer, and its embedding is not trained
)

"""Qwen2 and Qwen2.5: Llama with a bias of queries, keys and values."""

from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import SwitchedWindowByLayer, with_windows

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    qkv_bias=True,
    own_fields=SwitchedWindowByLayer,
    layers=with_windows,
)

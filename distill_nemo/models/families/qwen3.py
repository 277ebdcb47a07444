"""Qwen3: Llama with normalised queries and keys."""

from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import SwitchedWindowByLayer, with_windows

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    qk_norm=True,
    own_fields=SwitchedWindowByLayer,
    layers=with_windows,
)

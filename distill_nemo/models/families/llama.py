"""Llama 2 and 3, and models that are the same network: grouped queries, gated MLPs, Llama 3's scaled rotary angles."""

from distill_nemo.models.families.family import Family

LLAMA = Family("llama", "LlamaForCausalLM", defaults={"max_position_embeddings": 2048})

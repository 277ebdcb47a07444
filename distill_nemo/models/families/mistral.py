"""Mistral 7B, Mistral-Nemo and Mistral-Small: Llama with one sliding window in every layer, or none."""

from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import Window, with_windows


def _refused(config: Fields) -> dict[str, bool]:
    """Refuse a config that transformers' auto classes open as another family."""
    advice = 'a Ministral: set model_type "ministral" and architectures ["MinistralForCausalLM"]'
    return {f"layer_types (which makes it {advice})": config.values.get("layer_types") is not None}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    defaults={"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8},
    own_fields=Window,
    layers=with_windows,
    refused=_refused,
)

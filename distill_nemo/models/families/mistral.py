"""Mistral 7B, Mistral-Nemo and Mistral-Small: Llama with one sliding window in every layer, or none."""

from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import Window, with_windows


def _refused(config: Fields) -> dict[str, bool]:
    """Refuse what the auto classes of transformers open as another family."""
    advice = 'makes a Ministral: say model_type "ministral" and architectures ["MinistralForCausalLM"]; Mistral with it'
    return {f"layer_types {advice}": config.values.get("layer_types") is not None}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    defaults={"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8},
    own_fields=Window,
    layers=with_windows,
    refused=_refused,
)

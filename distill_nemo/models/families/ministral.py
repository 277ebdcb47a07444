"""Ministral 8B: Mistral with a sliding window in some layers."""

from dataclasses import dataclass

from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import LayerType, WindowByLayer, with_windows


@dataclass(frozen=True)
class _Windows(WindowByLayer):
    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return a window in all layers, if there is one."""
        return ["full_attention" if self.sliding_window is None else "sliding_attention"] * num_layers


MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    defaults={"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8},
    own_fields=_Windows,
    layers=with_windows,
)

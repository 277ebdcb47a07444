"""SmolLM3: Llama with layers that rotate no queries and keys (NoPE), by default every fourth."""

from dataclasses import dataclass, replace
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Layer
from distill_nemo.models.config_fields import MAX_POSITIONS
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.windows import LayerType, WindowByLayer, with_windows


@dataclass(frozen=True)
class _OwnFields(WindowByLayer):
    """Windows, and layers with a rotary embedding (1) or without (0): transformers' name says the opposite."""

    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = setting(4, at_least=1)
    sliding_window: int | None = setting(None, at_least=1, at_most=MAX_POSITIONS)
    use_sliding_window: bool = False

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return a window, if there is one, in the layers without a rotary embedding."""
        full = self.sliding_window is None
        return ["full_attention" if full or rotated else "sliding_attention" for rotated in self.no_rope_layers or []]

    def resolved(self, values: dict[str, Any]) -> Self:
        """Fill in `no_rope_layers`, which overrides the interval, and drop a window that no layer has."""
        count, rotary = values["num_layers"], self.no_rope_layers
        if rotary is None:
            rotary = [int((i + 1) % self.no_rope_layer_interval != 0) for i in range(count)]
        require(len(rotary) >= count, f"no_rope_layers has {len(rotary)} entries, num_layers = {count}")
        require({0, 1}.issuperset(rotary), "no_rope_layers must hold 0 (without) and 1 (with a rotary embedding) only")
        window = self.sliding_window if self.use_sliding_window else None
        own = replace(self, no_rope_layers=rotary[:count], no_rope_layer_interval=4, sliding_window=window)
        own = super(_OwnFields, own).resolved(values)
        used = "sliding_attention" in (own.layer_types or [])
        return own if used else replace(own, use_sliding_window=False, sliding_window=None)


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    rotary = values["family_fields"]["no_rope_layers"]
    same = with_windows(values, layers)
    return tuple(replace(layer, rope=0 if rotated else None) for layer, rotated in zip(same, rotary, strict=True))


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    own_fields=_OwnFields,
    layers=_layers,
    write_own=lambda model: {"pad_token_id": None},  # else 128004, for which a small vocabulary has no row
)

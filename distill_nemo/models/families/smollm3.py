"""SmolLM3: Llama with layers that rotate no queries and keys (NoPE), by default every fourth."""

from dataclasses import dataclass, replace
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Layer
from distill_nemo.models.families.family import Family, OwnFields


@dataclass(frozen=True)
class SmolLM3Fields(OwnFields):
    """Layers with a rotary embedding (1) and without (0); transformers names them the other way round."""

    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = setting(4, at_least=1)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Fill in `no_rope_layers`, one number a layer; the interval means nothing beside it."""
        count, rotary = values["num_layers"], self.no_rope_layers
        if rotary is None:
            rotary = [int((i + 1) % self.no_rope_layer_interval != 0) for i in range(count)]
        require(len(rotary) >= count, f"no_rope_layers has {len(rotary)} entries, num_layers = {count}")
        require({0, 1}.issuperset(rotary), "no_rope_layers must hold 0 (without) and 1 (with a rotary embedding) only")
        return replace(self, no_rope_layers=rotary[:count], no_rope_layer_interval=4)


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    rotary = values["family_fields"]["no_rope_layers"]
    return tuple(replace(layer, rope=0 if rotated else None) for layer, rotated in zip(layers, rotary, strict=True))


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    own_fields=SmolLM3Fields,
    layers=_layers,
    write_own=lambda model: {"pad_token_id": None},  # else 128004, for which a small vocabulary has no row
)

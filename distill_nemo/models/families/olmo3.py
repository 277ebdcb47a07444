"""OLMo 3: OLMo 2 with a sliding window in three of four layers, and a rotary embedding for each type of layer."""

from dataclasses import dataclass, replace
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.olmo2 import OLMO2
from distill_nemo.models.families.rope import parameters_by_type, read_rope
from distill_nemo.models.families.windows import LayerType, WindowByLayer, with_windows

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = 500000.0  # transformers 5's default for layers whose base is not stated


@dataclass(frozen=True)
class Olmo3Fields(WindowByLayer):
    """Window, and layers that have it."""

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return a window in all layers but every fourth."""
        return [FULL if (i + 1) % 4 == 0 else SLIDING for i in range(num_layers)]


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    types = values["family_fields"]["layer_types"]
    ropes = (OLMO3.layer_ropes.index(kind) for kind in types)
    return tuple(replace(layer, rope=rope) for layer, rope in zip(with_windows(values, layers), ropes, strict=True))


def _read_ropes(config: Fields) -> dict[str, Any]:
    """Read `rope_parameters` by type of layer, which transformers 5 writes, and `rope_scaling` of full attention.

    Raises:
        ValueError: for a base that its versions read differently, and as `parameters_by_type` does.
    """
    stated = parameters_by_type(config, OLMO3.layer_ropes)
    stated[FULL] |= config.mapping("rope_scaling").values
    for kind, own in stated.items():
        if "rope_theta" not in own and config.number("rope_theta") != THETA:
            raise ValueError(
                f"{config.where}: rope_theta = {config.values['rope_theta']} is read differently by transformers 4 and "
                f"5 where {kind} has none in rope_parameters; state it there"
            )
    nested = {kind: {"rope_theta": THETA, "rope_type": "default", **own} for kind, own in stated.items()}
    values = config.values | {"rope_scaling": None, "rope_parameters": nested}
    _, scaling = read_rope(Fields(values, config.where), OLMO3)
    assert scaling is not None, "both types of layers are stated"
    return {"rotary_base": scaling[FULL]["rope_theta"], "rope_scaling": scaling}


def _write(model: Architecture) -> dict[str, Any]:
    """Return both embeddings for transformers 5, and for 4 those it can state: one base, scaling of full attention."""
    nested = {kind: rope.stated for kind, rope in zip(OLMO3.layer_ropes, model.ropes, strict=True)}
    full = {name: value for name, value in nested[FULL].items() if name != "rope_theta"}
    return {
        "rope_theta": nested[FULL]["rope_theta"],
        "rope_scaling": None if full == {"rope_type": "default"} else full,
        "rope_parameters": nested,
        "pad_token_id": None,  # else 1, whatever the tokenizer
    }


OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    hf_class="Olmo3ForCausalLM",
    rope_types={"default": "default", "linear": "linear", "yarn": "yarn"},
    layer_ropes=(FULL, SLIDING),
    own_fields=Olmo3Fields,
    layers=_layers,
    read_own=_read_ropes,
    write_own=_write,
)

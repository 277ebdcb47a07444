"""Gemma 3: norms on both sides of attention and MLP, windows, scaled embeddings, capped logits."""

from dataclasses import dataclass, replace
from typing import Any

from distill_nemo.fields import setting
from distill_nemo.models.architecture import Architecture, Layer, Multipliers
from distill_nemo.models.config_fields import MAX_SIZE, Fields, shown
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import LAYER, Table, hidden, layer_table, replicated
from distill_nemo.models.families.rope import parameters_by_type
from distill_nemo.models.families.windows import LayerType, WindowByLayer, with_windows

ACTIVATION = "gelu_pytorch_tanh"
KINDS: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
NORMS: Table = {
    "pre_mlp_layernorm.weight": replicated(LAYER + "pre_feedforward_layernorm.weight", hidden),
    "self_attn_bda.norm.weight": replicated(LAYER + "post_attention_layernorm.weight", hidden),
    "mlp_bda.norm.weight": replicated(LAYER + "post_feedforward_layernorm.weight", hidden),
}


@dataclass(frozen=True)
class Gemma3Fields(WindowByLayer):
    """Windows in five of six layers, and constants. `layer_types` overrides the pattern."""

    sliding_window_pattern: int = setting(6, at_least=1)
    query_pre_attn_scalar: int = setting(256, "attention divides scores by its root", at_least=1, at_most=MAX_SIZE)
    final_logit_softcapping: float | None = setting(None, above=0)

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return full attention in the last layer of every `sliding_window_pattern`."""
        return [KINDS[(i + 1) % self.sliding_window_pattern == 0] for i in range(num_layers)]

    def resolved(self, values: dict[str, Any]) -> "Gemma3Fields":
        """Fill in `layer_types`."""
        return replace(super().resolved(values), sliding_window_pattern=6)


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    kinds = values["family_fields"]["layer_types"]
    pairs = zip(with_windows(values, layers), kinds, strict=True)
    return tuple(replace(layer, rope=KINDS.index(kind)) for layer, kind in pairs)


def gemma_multipliers(values: dict[str, Any]) -> Multipliers:
    """Return the constants of Gemma 2 and 3 (`Family.multipliers`)."""
    own = values["family_fields"]
    return Multipliers(
        embedding=values["hidden_size"] ** 0.5,
        rounds_embedding=True,
        softcap=own["final_logit_softcapping"],
        attention_softcap=own.get("attn_logit_softcapping"),
    )


def gemma_settings(model: Architecture) -> dict[str, Any]:
    """Return Megatron's fields of Gemma 2 and 3 (`Family.settings`)."""
    scale = model.family_fields["query_pre_attn_scalar"] ** -0.5
    return {"softmax_scale": scale, "layernorm_zero_centered_gamma": True}


def gemma_refused(config: Fields) -> dict[str, bool]:
    """Return features of Gemma 2 and 3 that are not supported (`Family.refused`)."""
    activation = config.text("hidden_activation", ACTIVATION)
    return {
        f"hidden_activation {activation}": activation != ACTIVATION,
        "use_bidirectional_attention": config.flag("use_bidirectional_attention"),
    }


def _refused(config: Fields) -> dict[str, bool]:
    capped = config.values.get("attn_logit_softcapping") is not None
    return {**gemma_refused(config), "attn_logit_softcapping (transformers ignores it)": capped}


def _spelled(config: Fields) -> dict[str, Any]:
    """Return the rotary embeddings by type of layer, as transformers 5 has them.

    Version 4 states both bases, and a scaling for the layers with full attention.

    Raises:
        ValueError: for a scaling whose type only version 4 reads.
    """
    scaling = config.mapping("rope_scaling").values
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f'{config.where}: rope_scaling with "type" = {shown(scaling["type"])} alone is not supported: '
            'transformers 5 does not read it in this family; write "rope_type"'
        )
    stated = parameters_by_type(config, KINDS)
    sliding = {"rope_theta": config.number("rope_local_base_freq", 1e4), **stated[KINDS[0]]}
    full = {"rope_theta": config.number("rope_theta", 1e6), **stated[KINDS[1]]}
    full |= scaling
    nested = {KINDS[0]: sliding, KINDS[1]: full}
    return {"rope_theta": full["rope_theta"], "rope_scaling": None, "rope_parameters": nested}


def _write(model: Architecture) -> dict[str, Any]:
    """Return the fields that transformers 4 and 5 read."""
    sliding, full = model.ropes
    scaling = {name: value for name, value in full.stated.items() if name != "rope_theta"}
    return {
        "hidden_activation": ACTIVATION,
        "rope_theta": full.rope_theta,
        "rope_local_base_freq": sliding.rope_theta,
        "rope_scaling": None if full.rope_type == "default" else scaling,
        "rope_parameters": {KINDS[0]: sliding.stated, KINDS[1]: full.stated},
    }


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | NORMS


GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    qk_norm=True,
    post_norms=True,
    activation=ACTIVATION,
    layer_ropes=KINDS,
    own_fields=Gemma3Fields,
    layers=_layers,
    multipliers=gemma_multipliers,
    settings=gemma_settings,
    spelled=_spelled,
    refused=_refused,
    write_own=_write,
    layer_table=_layer_table,
)

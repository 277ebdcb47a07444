"""Gated delta nets between layers of gated attention, as Qwen's hybrid families state them in `config.json`."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Architecture, DeltaNet, Layer
from distill_nemo.models.config_fields import MAX_HEADS, MAX_LAYERS, MAX_SIZE, Fields
from distill_nemo.models.families.family import OwnFields
from distill_nemo.models.families.pieces import (
    ATTENTION,
    LAYER,
    SELF,
    SHARED_GATE,
    Piece,
    Place,
    Rule,
    SizedRule,
    Table,
    clip,
    column_parallel,
    groups,
    head,
    heads,
    hidden,
    layer_table,
    one,
    piece_of,
    replicated,
    row_parallel,
    several_in_one,
    shared_experts,
)

LINEAR = LAYER + "linear_attn."
MixerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True)
class DeltaNetFields(OwnFields):
    """Layers with a gated delta net, and its sizes."""

    layer_types: list[MixerType] | None = None
    full_attention_interval: int = setting(4, "layers from one with attention to the next", at_least=1)
    linear_num_key_heads: int = setting(16, at_least=1, at_most=MAX_HEADS)
    linear_key_head_dim: int = setting(128, at_least=1, at_most=MAX_SIZE)
    linear_num_value_heads: int = setting(32, at_least=1, at_most=MAX_HEADS)
    linear_value_head_dim: int = setting(128, at_least=1, at_most=MAX_SIZE)
    linear_conv_kernel_dim: int = setting(4, at_least=1, at_most=MAX_LAYERS)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Fill in `layer_types`, which overrides the interval. Refuse heads that do not divide."""
        count, types = values["num_layers"], self.layer_types
        if types is None:
            full = self.full_attention_interval
            types = ["full_attention" if (i + 1) % full == 0 else "linear_attention" for i in range(count)]
        require(len(types) == count, f"layer_types has {len(types)} entries, num_layers = {count}")
        keys, values_ = self.linear_num_key_heads, self.linear_num_value_heads
        require(
            values_ % keys == 0,
            f"linear_num_value_heads = {values_} is not divisible by linear_num_key_heads = {keys}",
        )
        return replace(super().resolved(values), layer_types=types, full_attention_interval=4)


@dataclass(frozen=True)
class DeltaNetExperts(DeltaNetFields):
    """The same, with an MLP that processes every token beside its experts."""

    shared_expert_intermediate_size: int = setting(512, at_least=1, at_most=MAX_SIZE)


def delta_net(values: dict[str, Any]) -> DeltaNet:
    """Return the sizes of the delta nets (`Family.delta_net`)."""
    return DeltaNet(**{field.name: values["family_fields"][field.name] for field in fields(DeltaNet)})


def with_delta_nets(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Put delta nets in place of attention (`Family.layers`)."""
    require(
        values["block_configs"] is None,
        f'block_configs: layers that differ are not supported with delta nets (family "{values["family"]}")',
    )
    types = values["family_fields"]["layer_types"]
    return tuple(
        layer if kind == "full_attention" else replace(layer, num_query_groups=None, rope=None, mixer="gated_delta_net")
        for layer, kind in zip(layers, types, strict=True)
    )


def refused(config: Fields) -> dict[str, bool]:
    """Return what the classes of transformers ignore (`Family.refused`)."""
    gate, activation = config.values.get("attn_output_gate"), config.text("output_gate_type", "swish")
    return {
        f"attn_output_gate {gate} (transformers ignores it)": gate not in (None, True),
        f"output_gate_type {activation} (transformers ignores it)": activation not in ("swish", "silu"),
    }


def settings(model: Architecture) -> dict[str, Any]:
    """Return the norms' setting (`Family.settings`): they multiply by 1 + weight, but for those of delta nets."""
    return {"layernorm_zero_centered_gamma": True}


def _sizes(place: Place) -> DeltaNet:
    assert place.model.delta_net is not None
    return place.model.delta_net


def delta_keys(place: Place) -> int:
    """Return the channels of all keys of a delta net."""
    return _sizes(place).key_channels


def delta_values(place: Place) -> int:
    """Return the channels of all values of a delta net."""
    return _sizes(place).value_channels


def delta_heads(place: Place) -> int:
    """Return the number of a delta net's value heads."""
    return _sizes(place).linear_num_value_heads


def delta_head(place: Place) -> int:
    """Return the channels of one of its value heads."""
    return _sizes(place).linear_value_head_dim


def delta_kernel(place: Place) -> int:
    """Return the tokens that its convolution sees."""
    return _sizes(place).linear_conv_kernel_dim


def gated_heads(place: Place) -> int:
    """Return the channels of all queries and their gates, which alternate by head."""
    return 2 * heads(place)


def one_after_another(*rules: Rule) -> Rule:
    """Give a rank the rows of the first rule, then those of the next."""
    axes = {name: sizes for rule in rules if isinstance(rule, SizedRule) for name, sizes in rule.axes.items()}
    return SizedRule(lambda place: [piece for rule in rules for piece in rule(place)], axes)


def _queries_with_gates(place: Place) -> list[Piece]:
    """Return, by query group, the queries of its heads, their gates, its key and its value."""
    size, width, num_groups = head(place), (0, hidden(place)), place.layer.num_query_groups
    assert num_groups is not None
    each = place.model.num_attention_heads // num_groups
    whole = []
    for group in range(num_groups):
        own = range(group * each, (group + 1) * each)
        starts = [("q", 2 * n) for n in own] + [("q", 2 * n + 1) for n in own] + [("k", group), ("v", group)]
        whole += [
            piece_of(f"{SELF}{name}_proj.weight", place, (start * size, (start + 1) * size), width)
            for name, start in starts
        ]
    return clip(whole, place)


CONVOLVED = (delta_keys, delta_keys, delta_values)
GATED_ATTENTION: Table = {
    "self_attention.linear_qkv.weight": SizedRule(
        _queries_with_gates,
        {
            SELF + "q_proj.weight": ((gated_heads,), (hidden,)),
            SELF + "k_proj.weight": ((groups,), (hidden,)),
            SELF + "v_proj.weight": ((groups,), (hidden,)),
        },
    )
}
IN_PROJECTION = "self_attention.in_proj.weight"
DELTA_NET: Table = {
    "input_layernorm.weight": ATTENTION["input_layernorm.weight"],
    IN_PROJECTION: one_after_another(
        several_in_one(LINEAR + "in_proj_qkv.weight", CONVOLVED, hidden),
        column_parallel(LINEAR + "in_proj_z.weight", delta_values, hidden),
        column_parallel(LINEAR + "in_proj_b.weight", delta_heads, hidden),
        column_parallel(LINEAR + "in_proj_a.weight", delta_heads, hidden),
    ),
    "self_attention.conv1d.weight": several_in_one(LINEAR + "conv1d.weight", CONVOLVED, one, delta_kernel),
    "self_attention.A_log": column_parallel(LINEAR + "A_log", delta_heads),
    "self_attention.dt_bias": column_parallel(LINEAR + "dt_bias", delta_heads),
    "self_attention.out_norm.weight": replicated(LINEAR + "norm.weight", delta_head),
    "self_attention.out_proj.weight": row_parallel(LINEAR + "out_proj.weight", hidden, delta_values),
}


def delta_net_table(model: Architecture, layer: Layer) -> Table:
    """Return the tensors of a layer with a delta net or gated attention (`Family.layer_table`)."""
    mixer = DELTA_NET if layer.mixer == "gated_delta_net" else GATED_ATTENTION
    shared = shared_experts("shared_expert") | SHARED_GATE if layer.has_experts else {}
    return layer_table(model, layer) | mixer | shared

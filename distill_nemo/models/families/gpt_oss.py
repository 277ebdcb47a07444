"""gpt-oss: attention with sinks, windows in every other layer, and experts with biases and a clamped activation."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.fields import setting
from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import MAX_EXPERTS, MAX_POSITIONS, Fields, shown
from distill_nemo.models.families.family import Family, softmax_experts
from distill_nemo.models.families.pieces import (
    ATTENTION,
    EXPERT,
    LAYER,
    MLP_NORM,
    QKV_BIAS,
    SELF,
    Piece,
    Place,
    Rule,
    SizedRule,
    Table,
    clip,
    column_parallel,
    expert_ffn,
    experts,
    hidden,
    replicated,
    sized,
)
from distill_nemo.models.families.windows import AlternatingWindows, with_windows

LIMIT = 7.0  # of the experts' activation; transformers computes with no other
GATE_UP, DOWN = LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj"


@dataclass(frozen=True)
class GptOssFields(AlternatingWindows):
    """Windows in the first of every two layers."""

    sliding_window: int | None = setting(128, at_least=1, at_most=MAX_POSITIONS)


def gate_and_up(place: Place) -> int:
    """Return the rows of gate and up projection of one expert, which alternate by channel."""
    return 2 * expert_ffn(place)


@sized(lambda name, *others: {name: ((experts,), *((hidden,) for _ in others), (gate_and_up,))})
def _interleaved(name: str, *others: int) -> Rule:
    """Split gate and up projection separately: the even and the odd of an expert's last dimension.

    Args:
        name: tensor of all experts, [experts, hidden, 2 * expert_ffn], or their biases, [experts, 2 * expert_ffn].
        others: the middle dimension, if there is one; it becomes the parameter's second.
    """

    def pieces(place: Place) -> list[Piece]:
        axes = (len(others) + 1, *others)
        middle = [slice(0, hidden(place)) for _ in others]
        ends = [slice(first, gate_and_up(place) - 1 + first, 2) for first in range(2)]
        halves = [Piece(_named(name, place), (_own(place), *middle, end), axes) for end in ends]
        return [piece for half in halves for piece in clip([half], place)]

    return pieces


def _transposed(place: Place) -> list[Piece]:
    """Split the columns of [hidden, expert_ffn], stored as [experts, expert_ffn, hidden]."""
    share = expert_ffn(place) // place.size
    columns = slice(place.rank * share, (place.rank + 1) * share)
    return [Piece(_named(DOWN, place), (_own(place), columns, slice(0, hidden(place))), axes=(2, 1))]


def _down_bias(place: Place) -> list[Piece]:
    return [Piece(_named(DOWN + "_bias", place), (_own(place), slice(0, hidden(place))), axes=(1,))]


def num_heads(place: Place) -> int:
    """Return the number of query heads."""
    return place.model.num_attention_heads


def _named(name: str, place: Place) -> str:
    return name.format(i=place.number)


def _own(place: Place) -> slice:
    return slice(place.expert, place.expert + 1)


TABLE: Table = {
    **ATTENTION,
    **QKV_BIAS,
    **MLP_NORM,
    "self_attention.linear_proj.bias": replicated(SELF + "o_proj.bias", hidden),
    "self_attention.core_attention.softmax_offset": column_parallel(SELF + "sinks", num_heads),
    "mlp.router.weight": replicated(LAYER + "mlp.router.weight", experts, hidden),
    "mlp.router.bias": replicated(LAYER + "mlp.router.bias", experts),
    EXPERT + "linear_fc1.weight": _interleaved(GATE_UP, 1),
    EXPERT + "linear_fc1.bias": _interleaved(GATE_UP + "_bias"),
    EXPERT + "linear_fc2.weight": SizedRule(_transposed, {DOWN: ((experts,), (expert_ffn,), (hidden,))}),
    EXPERT + "linear_fc2.bias": SizedRule(_down_bias, {DOWN + "_bias": ((experts,), (hidden,))}),
}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return TABLE


def _read_experts(config: Fields) -> dict[str, Any]:
    return {
        "num_experts": config.integer("num_local_experts", most=MAX_EXPERTS),
        "num_experts_per_tok": config.integer("num_experts_per_tok", most=MAX_EXPERTS),
        "moe_ffn_hidden_size": config.integer("intermediate_size"),
        "norm_topk_prob": True,
    }


def _write(model: Architecture) -> dict[str, Any]:
    assert model.experts is not None
    return {
        "num_local_experts": model.experts.num_experts,
        "num_experts_per_tok": model.experts.num_experts_per_tok,
        "intermediate_size": model.experts.moe_ffn_hidden_size,
        "attention_bias": True,
        "hidden_act": "silu",  # which it only resembles
        "swiglu_limit": LIMIT,
    }


def _refused(config: Fields) -> dict[str, bool]:
    limit, ropes = config.values.get("swiglu_limit", LIMIT), ("rope_scaling", "rope_parameters")
    return {
        f"swiglu_limit {shown(limit)}": limit != LIMIT,
        "attention_bias false": config.values.get("attention_bias", True) is not True,
        "a config without rope_scaling or rope_parameters (transformers' versions take others)": not any(
            config.mapping(name).values for name in ropes
        ),
    }


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
    },
    qkv_bias=True,
    linear_bias=True,
    attention_sinks=True,
    experts=softmax_experts,
    own_fields=GptOssFields,
    layers=with_windows,
    traits=lambda values: {"activation": "clamped_quick_gelu"},
    settings=lambda model: {"activation_func_clamp_value": LIMIT, "glu_linear_offset": 1.0},
    read_own=_read_experts,
    write_own=_write,
    refused=_refused,
    layer_table=_layer_table,
)

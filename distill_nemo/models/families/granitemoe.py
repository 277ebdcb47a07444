"""Granite 3 with experts (1B-A400M, 3B-A800M), PowerMoE: Granite whose MLPs are mixtures of experts."""

from functools import partial
from typing import Any

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.config_fields import Fields
from distill_nemo.models.families.experts import read_experts, write_experts
from distill_nemo.models.families.family import Family, softmax_experts
from distill_nemo.models.families.granite import GraniteFields, multipliers, settings
from distill_nemo.models.families.pieces import (
    EXPERT,
    LAYER,
    Piece,
    Place,
    SizedRule,
    Table,
    clip,
    expert_ffn,
    experts,
    hidden,
    layer_table,
    replicated,
)

BLOCK = LAYER + "block_sparse_moe."
GATE_UP, DOWN = BLOCK + "input_linear.weight", BLOCK + "output_linear.weight"
NAMES = {"count": "num_local_experts", "width": "intermediate_size"}


def _gate_up(place: Place) -> list[Piece]:
    """Split gate and up projection separately, from [experts, 2 * expert_ffn, hidden]."""
    width = expert_ffn(place)
    halves = [_matrix(GATE_UP, place, slice(start, start + width), slice(0, hidden(place))) for start in (0, width)]
    return [piece for half in halves for piece in clip([half], place)]


def _down(place: Place) -> list[Piece]:
    """Split the columns of [experts, hidden, expert_ffn]."""
    share = expert_ffn(place) // place.size
    columns = slice(place.rank * share, (place.rank + 1) * share)
    return [_matrix(DOWN, place, slice(0, hidden(place)), columns)]


def _matrix(name: str, place: Place, rows: slice, columns: slice) -> Piece:
    """Return a part of an expert's matrix."""
    own = slice(place.expert, place.expert + 1)
    return Piece(name.format(i=place.number), (own, rows, columns), axes=(1, 2))


EXPERTS: Table = {
    "mlp.router.weight": replicated(BLOCK + "router.layer.weight", experts, hidden),
    EXPERT + "linear_fc1.weight": SizedRule(_gate_up, {GATE_UP: ((experts,), (expert_ffn, expert_ffn), (hidden,))}),
    EXPERT + "linear_fc2.weight": SizedRule(_down, {DOWN: ((experts,), (hidden,), (expert_ffn,))}),
}


def _read(config: Fields) -> dict[str, Any]:
    return read_experts(config, **NAMES) | {"norm_topk_prob": True}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    return layer_table(model, layer) | EXPERTS


GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    defaults={"max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2},
    experts=softmax_experts,
    own_fields=GraniteFields,
    multipliers=multipliers,
    settings=settings,
    read_own=_read,
    write_own=partial(write_experts, **NAMES),
    layer_table=_layer_table,
)

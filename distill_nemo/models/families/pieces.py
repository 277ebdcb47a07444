"""Tables of the parts of Hugging Face tensors that make each Megatron parameter.

A table maps the name of a Megatron parameter, within its layer, to a rule. For a place in the model and a rank, a rule
returns pieces. Concatenated along the first dimension, they are that rank's parameter. Import, export, the check of
a directory's headers, Megatron's names and shapes, and parameter counts all follow from the same table.

Names of Hugging Face tensors may hold `{i}` (number of the layer) and `{e}` (number of the expert).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import NamedTuple

from distill_nemo.models.architecture import Architecture, Layer, padded_vocab_size

EXPERT = "mlp.experts."  # prefix of parameters that exist once per expert
EXPERT_BIAS = "mlp.router.expert_bias"  # a buffer: no optimizer updates it
OUTSIDE = Layer(None, None)  # place of the parameters around the layers


@dataclass(frozen=True)
class Piece:
    """A part of a Hugging Face tensor, or rows of zeros.

    Args:
        name: of the tensor; empty for rows of zeros, which pad the vocabulary.
        index: start, stop and step along every dimension of the tensor.
        axes: dimensions of the tensor that are those of the parameter, in the parameter's order. The piece has size 1
            along all others. None: all, in the tensor's order.
    """

    name: str
    index: tuple[slice, ...]
    axes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along every dimension of the parameter."""
        parts = self.index if self.axes is None else [self.index[axis] for axis in self.axes]
        return tuple(-(-(part.stop - part.start) // (part.step or 1)) for part in parts)

    def rows(self, start: int, stop: int) -> "Piece":
        """Return the piece's rows `start` to `stop`, counted along the parameter's first dimension."""
        axis, index = 0 if self.axes is None else self.axes[0], list(self.index)
        first, step = index[axis].start, index[axis].step or 1
        index[axis] = slice(first + start * step, first + (stop - 1) * step + 1, index[axis].step)
        return replace(self, index=tuple(index))


class Place(NamedTuple):
    """A parameter's place in the model, and one of the ranks that share it."""

    model: Architecture
    layer: Layer
    number: int = 0  # of the layer
    expert: int = 0
    size: int = 1  # tensor-parallel ranks; for experts, expert-tensor-parallel ones
    rank: int = 0


Rule = Callable[[Place], list[Piece]]
Table = dict[str, Rule]
Size = Callable[[Place], int]
Axes = dict[str, tuple[tuple[Size, ...], ...]]  # along every dimension of each tensor, sizes that follow one another


@dataclass(frozen=True)
class SizedRule:
    """A rule that knows the sizes of its tensors by name."""

    pieces: Rule
    axes: Axes

    def __call__(self, place: Place) -> list[Piece]:
        """Return the pieces of one rank."""
        return self.pieces(place)


def sized[**P](axes: Callable[..., Axes]) -> Callable[[Callable[P, Rule]], Callable[P, Rule]]:
    """Make a function that returns rules state their axes too, which `axes` returns for the same arguments."""

    def decorate(make: Callable[P, Rule]) -> Callable[P, Rule]:
        @wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> Rule:
            return SizedRule(make(*args, **kwargs), axes(*args, **kwargs))

        return made

    return decorate


def vocab(place: Place) -> int:
    """Return the number of tokens."""
    return place.model.vocab_size


def one(place: Place) -> int:
    """Return 1."""
    return 1


def hidden(place: Place) -> int:
    """Return the width of the residual stream."""
    return place.model.hidden_size


def heads(place: Place) -> int:
    """Return the channels of all queries."""
    return place.model.num_attention_heads * place.model.kv_channels


def groups(place: Place) -> int:
    """Return the channels of all keys."""
    return (place.layer.num_query_groups or 0) * place.model.kv_channels


def head(place: Place) -> int:
    """Return the channels of one head."""
    return place.model.kv_channels


def ffn(place: Place) -> int:
    """Return the width of the MLP."""
    assert place.layer.ffn_hidden_size is not None
    return place.layer.ffn_hidden_size


def expert_ffn(place: Place) -> int:
    """Return the width of one expert."""
    assert place.layer.ffn_hidden_size is not None
    return place.layer.ffn_hidden_size


def experts(place: Place) -> int:
    """Return the number of experts."""
    assert place.model.experts is not None
    return place.model.experts.num_experts


def shared_ffn(place: Place) -> int:
    """Return the width of the MLP beside the experts."""
    assert place.model.experts is not None and place.model.experts.shared_ffn_hidden_size is not None
    return place.model.experts.shared_ffn_hidden_size


def clip(pieces: Iterable[Piece], place: Place) -> list[Piece]:
    """Return this rank's share of the rows of a whole parameter: an equal, consecutive part."""
    pieces = list(pieces)
    rows = sum(piece.shape[0] for piece in pieces)
    assert rows % place.size == 0, f"{rows} rows on {place.size} ranks"
    share = rows // place.size
    start, stop, at, own = place.rank * share, (place.rank + 1) * share, 0, []
    for piece in pieces:
        begin, end = max(start - at, 0), min(stop - at, piece.shape[0])
        if begin < end:
            own.append(piece.rows(begin, end))
        at += piece.shape[0]
    return own


@sized(lambda name, *shape: {name: tuple((size,) for size in shape)})
def replicated(name: str, *shape: Size) -> Rule:
    """Give every rank the whole tensor."""
    return lambda place: [piece_of(name, place, *((0, size(place)) for size in shape))]


@sized(lambda name, *shape: {name: tuple((size,) for size in shape)})
def column_parallel(name: str, *shape: Size) -> Rule:
    """Split the rows."""
    return lambda place: clip(replicated(name, *shape)(place), place)


@sized(lambda name, rows, columns: {name: ((rows,), (columns,))})
def row_parallel(name: str, rows: Size, columns: Size) -> Rule:
    """Split the columns."""

    def pieces(place: Place) -> list[Piece]:
        share, rest = divmod(columns(place), place.size)
        assert not rest, f"{columns(place)} columns on {place.size} ranks"
        return [piece_of(name, place, (0, rows(place)), (place.rank * share, (place.rank + 1) * share))]

    return pieces


@sized(lambda name: {name: ((vocab,), (hidden,))})
def vocabulary(name: str) -> Rule:
    """Split the rows, padded with zeros to Megatron's size."""

    def pieces(place: Place) -> list[Piece]:
        rows, width = place.model.vocab_size, place.model.hidden_size
        padding = padded_vocab_size(rows) - rows
        whole = [piece_of(name, place, (0, rows), (0, width))]
        return clip(whole + ([Piece("", (slice(0, padding), slice(0, width)))] if padding else []), place)

    return pieces


@sized(lambda gate, up, width=ffn: {name: ((width,), (hidden,)) for name in (gate, up)})
def gated(gate: str, up: str, width: Size = ffn) -> Rule:
    """Split gate and up projection separately. A rank has the gate's rows, then those of up."""
    gate_rows, up_rows = column_parallel(gate, width, hidden), column_parallel(up, width, hidden)
    return lambda place: gate_rows(place) + up_rows(place)


@sized(lambda name: {name: ((ffn, ffn), (hidden,))})
def gated_in_one(name: str) -> Rule:
    """Split gate and up projection separately, from one tensor that holds the gate's rows, then those of up."""
    return several_in_one(name, (ffn, ffn), hidden)


@sized(lambda name, parts, *columns: {name: (parts, *((size,) for size in columns))})
def several_in_one(name: str, parts: tuple[Size, ...], *columns: Size) -> Rule:
    """Split each part of a tensor's rows separately. A rank has its share of the first part, then of the next."""

    def pieces(place: Place) -> list[Piece]:
        start, own = 0, []
        for part in parts:
            rows = part(place)
            piece = piece_of(name, place, (start, start + rows), *((0, size(place)) for size in columns))
            own += clip([piece], place)
            start += rows
        return own

    return pieces


@sized(
    lambda query, key, value, *columns: {
        name: ((rows,), *((size,) for size in columns))
        for name, rows in ((query, heads), (key, groups), (value, groups))
    }
)
def query_key_value(query: str, key: str, value: str, *columns: Size) -> Rule:
    """Interleave by query group: the group's queries, its key, its value. Split the rows of the result."""
    return _by_group((query, key, value), lambda place: (0, 0, 0), columns)


@sized(lambda name, *columns: {name: ((heads, groups, groups), *((size,) for size in columns))})
def query_key_value_in_one(name: str, *columns: Size) -> Rule:
    """Interleave by query group, from one tensor that holds all queries, then all keys, then all values."""
    return _by_group((name, name, name), lambda place: (0, heads(place), heads(place) + groups(place)), columns)


def _by_group(
    names: tuple[str, str, str], starts: Callable[[Place], tuple[int, int, int]], columns: tuple[Size, ...]
) -> Rule:
    def pieces(place: Place) -> list[Piece]:
        num_groups = place.layer.num_query_groups
        assert num_groups is not None
        rows = (heads(place) // num_groups, head(place), head(place))
        others = [(0, size(place)) for size in columns]
        whole = [
            piece_of(name, place, (start + group * size, start + (group + 1) * size), *others)
            for group in range(num_groups)
            for name, start, size in zip(names, starts(place), rows, strict=True)
        ]
        return clip(whole, place)

    return pieces


def piece_of(name: str, place: Place, *bounds: tuple[int, int]) -> Piece:
    """Return a rectangle of a tensor, by start and stop along every dimension."""
    return Piece(name.format(i=place.number, e=place.expert), tuple(slice(*pair) for pair in bounds))


LAYER = "model.layers.{i}."
SELF = LAYER + "self_attn."
ATTENTION: Table = {
    "input_layernorm.weight": replicated(LAYER + "input_layernorm.weight", hidden),
    "self_attention.linear_qkv.weight": query_key_value(
        SELF + "q_proj.weight", SELF + "k_proj.weight", SELF + "v_proj.weight", hidden
    ),
    "self_attention.linear_proj.weight": row_parallel(SELF + "o_proj.weight", hidden, heads),
}
QKV_BIAS: Table = {
    "self_attention.linear_qkv.bias": query_key_value(SELF + "q_proj.bias", SELF + "k_proj.bias", SELF + "v_proj.bias")
}
QK_NORM: Table = {
    f"self_attention.{name}_layernorm.weight": replicated(f"{SELF}{name}_norm.weight", head) for name in "qk"
}
WIDE_QK_NORM: Table = {
    "self_attention.q_layernorm.weight": column_parallel(SELF + "q_norm.weight", heads),
    "self_attention.k_layernorm.weight": column_parallel(SELF + "k_norm.weight", groups),
}
MLP_NORM: Table = {"pre_mlp_layernorm.weight": replicated(LAYER + "post_attention_layernorm.weight", hidden)}
MLP: Table = {
    "mlp.linear_fc1.weight": gated(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": row_parallel(LAYER + "mlp.down_proj.weight", hidden, ffn),
}
EXPERTS: Table = {
    "mlp.router.weight": replicated(LAYER + "mlp.gate.weight", experts, hidden),
    EXPERT + "linear_fc1.weight": gated(
        LAYER + "mlp.experts.{e}.gate_proj.weight", LAYER + "mlp.experts.{e}.up_proj.weight", expert_ffn
    ),
    EXPERT + "linear_fc2.weight": row_parallel(LAYER + "mlp.experts.{e}.down_proj.weight", hidden, expert_ffn),
}
ROUTER_BIAS: Table = {EXPERT_BIAS: replicated(LAYER + "mlp.gate.e_score_correction_bias", experts)}
SHARED_GATE: Table = {
    "mlp.shared_experts.gate_weight": replicated(LAYER + "mlp.shared_expert_gate.weight", one, hidden)
}
EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def shared_experts(name: str) -> Table:
    """Return the table of the MLP beside the experts, by its name in Hugging Face's layers."""
    gate, up, down = (f"{LAYER}mlp.{name}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return {
        "mlp.shared_experts.linear_fc1.weight": gated(gate, up, shared_ffn),
        "mlp.shared_experts.linear_fc2.weight": row_parallel(down, hidden, shared_ffn),
    }


def layer_table(model: Architecture, layer: Layer) -> Table:
    """Return the table of one layer of Llama, Qwen, and networks with the same names."""
    table: Table = {}
    if layer.num_query_groups is not None:
        table |= ATTENTION | (QKV_BIAS if model.qkv_bias else {}) | (QK_NORM if model.qk_norm else {})
    if layer.ffn_hidden_size is not None:
        table |= MLP_NORM | (EXPERTS if layer.has_experts else MLP)
    if layer.has_experts and model.experts is not None and model.experts.has_expert_bias:
        table |= ROUTER_BIAS
    return table


def table_around(model: Architecture) -> Table:
    """Return the table of parameters outside the layers. A tied output layer is the embedding."""
    embedding = "model.embed_tokens.weight"
    return {
        EMBEDDING: vocabulary(embedding),
        FINAL_NORM: replicated("model.norm.weight", hidden),
        OUTPUT: vocabulary(embedding if model.tie_word_embeddings else "lm_head.weight"),
    }

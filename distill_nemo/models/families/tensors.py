"""Tensors of a whole model, in Hugging Face's naming and in Megatron's, from its family's tables."""

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.pieces import (
    EXPERT,
    OUTPUT,
    OUTSIDE,
    Piece,
    Place,
    Rule,
    SizedRule,
    Table,
)

Shapes = dict[str, tuple[int, ...]]

LOCAL_NAMES = {  # Transformer Engine's fused layer norms -> their names in local layers and in tables
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
FUSED_NAMES = {local: fused for fused, local in LOCAL_NAMES.items()}


class Parameter(NamedTuple):
    """A whole Megatron parameter.

    Args:
        name: name within its layer.
        rule: returns its pieces.
        place: its place in the model; `OUTSIDE` the layers for embedding, last norm and output layer.
    """

    name: str
    rule: Rule
    place: Place

    @property
    def pieces(self) -> list[Piece]:
        """Pieces of Hugging Face tensors that, concatenated, are its rows."""
        return self.rule(self.place)

    def of(self, model: Architecture) -> "Parameter":
        """Return the same parameter of a model of other sizes."""
        inside = self.place.layer is not OUTSIDE
        layer = model.layers[self.place.number] if inside else OUTSIDE
        return self._replace(place=self.place._replace(model=model, layer=layer))


def table_of(model: Architecture, layer: Layer) -> Table:
    """Return the table of one layer."""
    return FAMILIES[model.family].layer_table(model, layer)


def table_around(model: Architecture) -> Table:
    """Return the table of parameters outside the layers."""
    return FAMILIES[model.family].table_around(model)


def parameters(model: Architecture) -> Iterator[Parameter]:
    """Yield every parameter of a model, experts one by one, without a tied output layer."""
    for name, rule in table_around(model).items():
        if name != OUTPUT or not model.tie_word_embeddings:
            yield Parameter(name, rule, Place(model, OUTSIDE))
    for number, layer in enumerate(model.layers):
        for name, rule in table_of(model, layer).items():
            for expert in range(_copies(model, name)):
                yield Parameter(name, rule, Place(model, layer, number, expert))


def _copies(model: Architecture, name: str) -> int:
    return model.experts.num_experts if model.experts is not None and name.startswith(EXPERT) else 1


def hf_shapes(model: Architecture) -> Shapes:
    """Return name and shape of every tensor of a model in Hugging Face's naming."""
    return shapes_of(piece for parameter in parameters(model) for piece in parameter.pieces)


class Span(NamedTuple):
    """Consecutive rows, or columns, of a tensor that belong to one axis of the network, by the name of its size."""

    axis: str
    size: int


def hf_axes(model: Architecture) -> dict[str, tuple[tuple[Span, ...], ...]]:
    """Return what the dimensions of every tensor consist of: ((ffn, 768),), ((hidden, 256),) for an up projection.

    All that has a size of that name changes together when a model is made smaller.
    """
    return {
        name.format(i=place.number, e=place.expert): tuple(
            tuple(Span(size.__name__, size(place)) for size in sizes) for sizes in dimensions
        )
        for _, rule, place in parameters(model)
        if isinstance(rule, SizedRule)
        for name, dimensions in rule.axes.items()
    }


def shapes_of(pieces: Iterable[Piece]) -> Shapes:
    """Return name and shape of the tensors that the pieces cover."""
    shapes: Shapes = {}
    for piece in pieces:
        if piece.name:
            ends = tuple(part.stop for part in piece.index)
            shapes[piece.name] = tuple(map(max, shapes.get(piece.name, ends), ends))
    return shapes


def num_parameters(model: Architecture) -> int:
    """Return the number of parameters of a model. Layers of a kind, and their experts, are counted once."""
    tied = {OUTPUT} if model.tie_word_embeddings else set()
    outside = {name: rule for name, rule in table_around(model).items() if name not in tied}
    kinds = Counter(model.layers).items()
    return _count(model, OUTSIDE, outside) + sum(n * _count(model, each, table_of(model, each)) for each, n in kinds)


def _count(model: Architecture, layer: Layer, table: Table) -> int:
    return sum(
        _copies(model, name) * prod(piece.shape)
        for name, rule in table.items()
        for piece in rule(Place(model, layer))
        if piece.name
    )

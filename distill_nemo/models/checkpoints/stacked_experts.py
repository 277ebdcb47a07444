"""Experts of a layer stored together, as transformers 5 has them in memory and writes them if asked to.

`mlp.experts.gate_up_proj` is [experts, 2 * width, hidden], each gate before its up projection; `down_proj` is [experts,
hidden, width]. Families name one matrix per expert.
"""

import re
from collections.abc import Container, Mapping

from distill_nemo.models.config_fields import MAX_EXPERTS
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.tensors import Shapes
from distill_nemo.models.sources import StoredTensor

ONE = re.compile(r"(?P<layer>model\.layers\.\d+\.mlp\.experts\.)(?P<number>\d+)\.(?P<kind>gate|up|down)_proj\.weight")
STACK = re.compile(r"(?P<layer>model\.layers\.\d+\.mlp\.experts\.)(?P<kind>gate_up|down)_proj")


def unstacked(found: Shapes, wanted: Container[str]) -> Shapes:
    """Replace the shapes of stacks by those of their experts' matrices. Stacks that are wanted as they are stay."""
    shapes: Shapes = {}
    for name, shape in found.items():
        stack = STACK.fullmatch(name)
        kinds = ("down",) if stack and stack["kind"] == "down" else ("gate", "up")
        if stack is None or name in wanted or len(shape) != 3 or shape[0] > MAX_EXPERTS or shape[1] % len(kinds):
            shapes[name] = shape
            continue
        matrix = (shape[1] // len(kinds), shape[2])
        shapes |= {f"{stack['layer']}{i}.{kind}_proj.weight": matrix for kind in kinds for i in range(shape[0])}
    return shapes


def in_stack(piece: Piece, stored: Mapping[str, StoredTensor]) -> Piece:
    """Return the same part of the stack that holds it; other pieces unchanged."""
    one = ONE.fullmatch(piece.name)
    if one is None or piece.name in stored:
        return piece
    number, (rows, columns) = int(one["number"]), piece.index
    stack = f"{one['layer']}{'down' if one['kind'] == 'down' else 'gate_up'}_proj"
    first = stored[stack].shape[1] // 2 if one["kind"] == "up" else 0
    index = (slice(number, number + 1), slice(rows.start + first, rows.stop + first), columns)
    return Piece(stack, index, axes=(1, 2))

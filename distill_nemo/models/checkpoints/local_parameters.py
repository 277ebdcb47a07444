"""Parameters of this rank's part of a model, each with the rule that gives its pieces of Hugging Face tensors."""

import itertools
import re
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.hf_tensors import as_parameter
from distill_nemo.models.families.pieces import EXPERT, EXPERT_BIAS, OUTSIDE, Piece, Place, Rule
from distill_nemo.models.families.tensors import LOCAL_NAMES, Shapes, shapes_of, table_around, table_of

IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
OF_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<name>.+)")
OF_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<name>.+\D)(?P<number>\d+)")
ROWS_AT_ONCE = 4096  # of a parameter to read


class LocalParameter(NamedTuple):
    """A parameter of this rank.

    Args:
        name: name in `named_parameters`.
        tensor: its values.
        rule: returns the pieces of any rank.
        place: its place in the model, and this rank.
        group: ranks that together hold the whole parameter.
    """

    name: str
    tensor: Tensor
    rule: Rule
    place: Place
    group: ProcessGroup

    @property
    def pieces(self) -> list[Piece]:
        """Pieces that this rank's tensor consists of."""
        return self.pieces_of(self.place.rank)

    @property
    def of_expert(self) -> bool:
        """True for a parameter of one expert."""
        return f".{EXPERT}" in self.name

    @property
    def is_first_copy(self) -> bool:
        """True on the first of the ranks that hold the same part."""
        if self.of_expert:
            return parallel_state.get_expert_data_parallel_rank() == 0
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    @property
    def is_split(self) -> bool:
        """True if the ranks of the group hold different parts."""
        return self.place.size > 1 and self.pieces_of(0) != self.pieces_of(1)

    def pieces_of(self, rank: int) -> list[Piece]:
        """Return the pieces of another rank of the group."""
        return self.rule(self.place._replace(rank=rank))

    def fill(self, read: Callable[[Piece], Tensor]) -> None:
        """Write every row: pieces as `read` returns them, and zeros for padding."""
        for piece, rows in rows_of(self.pieces, self.tensor.data):
            if not piece.name:
                rows.zero_()
                continue
            for first, some in enumerate(rows.split(ROWS_AT_ONCE)):  # quantised ones are read in fp32
                start = first * ROWS_AT_ONCE
                some.copy_(read(piece.rows(start, start + len(some))))

    def differing(self, names: Container[str], read: Callable[[Piece], Tensor]) -> Iterator[str]:
        """Yield those of `names` whose pieces are not, bit for bit, as `read` returns them."""
        for piece, rows in rows_of(self.pieces, self.tensor.detach()):
            if piece.name in names and not torch.equal(bytes_of(read(piece)), bytes_of(rows.cpu())):
                yield piece.name

    def whole_shapes(self) -> Shapes:
        """Return the shapes of the Hugging Face tensors that the group's ranks hold together."""
        return shapes_of(self.rule(self.place._replace(size=1, rank=0)))


def local_parameters(built: GPTModel, model: Architecture) -> Iterator[LocalParameter]:
    """Yield every parameter of `built`, this rank's part of `model`, and buffers that checkpoints hold.

    Raises:
        AssertionError: for a parameter that the family's table does not have.
    """
    buffers = ((name, buffer) for name, buffer in built.named_buffers() if name.endswith(EXPERT_BIAS))
    for name, tensor in itertools.chain(built.named_parameters(), buffers):
        in_layer = IN_LAYER.fullmatch(name)
        if in_layer is None:
            rule, place = table_around(model)[name], Place(model, OUTSIDE)
        else:
            module = built.decoder.layers[int(in_layer[1])]
            assert isinstance(module, TransformerLayer)
            rule, place = _in_layer(in_layer[2], module, model)
        group = _group(f".{EXPERT}" in name)
        yield LocalParameter(name, tensor, rule, place._replace(size=group.size(), rank=group.rank()), group)


def _in_layer(name: str, module: TransformerLayer, model: Architecture) -> tuple[Rule, Place]:
    number, expert = module.layer_number - 1, 0
    name = LOCAL_NAMES.get(name, name)
    of_expert = OF_EXPERT.fullmatch(name) or OF_GROUPED_EXPERT.fullmatch(name)
    if of_expert is not None:
        assert isinstance(module.mlp, MoELayer)
        name, expert = EXPERT + of_expert["name"], module.mlp.local_expert_indices[int(of_expert["number"])]
    table = table_of(model, model.layers[number])
    assert name in table, f"{model.family} has no rule for {name} of layer {number}"
    return table[name], Place(model, model.layers[number], number, expert)


def _group(of_expert: bool) -> ProcessGroup:
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if of_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    assert isinstance(group, ProcessGroup)
    return group


class WholeRows(NamedTuple):
    """Consecutive whole rows of a Hugging Face tensor, from `first` on."""

    name: str
    first: int
    rows: Tensor


def rows_to_write(parameter: LocalParameter) -> list[WholeRows]:
    """Return what this rank writes of a parameter. Collective over its group."""
    if not parameter.is_first_copy:
        return []
    rows, is_first = _own_rows(parameter), parameter.group.rank() == 0
    if rows is not None:
        return rows if is_first or parameter.is_split else []
    tensor = parameter.tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(parameter.place.size)] if is_first else None
    if parameter.place.size > 1:
        dist.gather(tensor, parts, group=parameter.group, group_dst=0)
    else:
        parts = [tensor]
    return _joined_rows(parts, parameter) if parts is not None else []


def _own_rows(parameter: LocalParameter) -> list[WholeRows] | None:
    """Return this rank's part as views, or None if it is made of parts of rows. The ranks of a group agree."""
    shapes = parameter.whole_shapes()
    pairs = [pair for pair in rows_of(parameter.pieces, parameter.tensor.detach()) if pair[0].name]
    if not all(_has_whole_rows(piece, shapes[piece.name]) for piece, _ in pairs):
        return None
    return [WholeRows(piece.name, piece.index[0].start, rows) for piece, rows in pairs]


def _joined_rows(parts: list[Tensor], parameter: LocalParameter) -> list[WholeRows]:
    """Assemble rows from a parameter's parts, one of each rank of its group."""
    found: dict[str, list[tuple[Piece, Tensor]]] = {}
    for rank, part in enumerate(parts):
        for piece, rows in rows_of(parameter.pieces_of(rank), part):
            if piece.name:
                found.setdefault(piece.name, []).append((piece, rows))
    shapes = parameter.whole_shapes()
    return [_joined(name, pieces, shapes[name]) for name, pieces in found.items()]


def _has_whole_rows(piece: Piece, shape: tuple[int, ...]) -> bool:
    of_rows, *others = piece.index
    whole = [slice(0, size) for size in shape[1:]]
    return piece.axes is None and of_rows.step in (None, 1) and others == whole


def _joined(name: str, pieces: list[tuple[Piece, Tensor]], shape: tuple[int, ...]) -> WholeRows:
    first = min(piece.index[0].start for piece, _ in pieces)
    whole = pieces[0][1].new_empty(shape[0] - first, *shape[1:])
    for piece, rows in pieces:
        of_rows, *others = piece.index
        index = slice(of_rows.start - first, of_rows.stop - first, of_rows.step), *others
        as_parameter(whole[index], piece).copy_(rows)
    return WholeRows(name, first, whole)


def rows_of(pieces: list[Piece], tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Pair every piece with its rows of the parameter."""
    sizes = [piece.shape[0] for piece in pieces]
    assert sum(sizes) == len(tensor), (pieces, tensor.shape)
    yield from zip(pieces, tensor.split(sizes), strict=True)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's values."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)

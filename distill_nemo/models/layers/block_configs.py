"""Read and write `block_configs`, the sizes of layers that differ.

The format is that of Nemotron's NAS models, as Megatron-Core reads it: one entry per layer,
`{"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 14336}}`, with `{"no_op": true}` for a part that is
left out. `n_heads_in_group` and `ffn_mult` are read too.
"""

import copy
from typing import Any

from megatron.core.transformer.heterogeneous.heterogeneous_config import AttentionConfig, MLPConfig

from distill_nemo.models.architecture import Layer

EXAMPLE = '{"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 14336}}, or {"no_op": true} for a part'


def read_block_configs(blocks: list[dict[str, Any]], num_attention_heads: int, hidden_size: int) -> tuple[Layer, ...]:
    """Return the sizes of each layer.

    Raises:
        ValueError: for an entry that cannot be read, naming the layer.
    """
    return tuple(_layer(i, block, num_attention_heads, hidden_size) for i, block in enumerate(blocks))


def _layer(number: int, block: dict[str, Any], num_attention_heads: int, hidden_size: int) -> Layer:
    try:
        own = copy.deepcopy(block)  # Megatron pops from it
        for part in (own["attention"], own.get("ffn") or own["mlp"]):
            if part.get("no_op"):  # its other fields mean nothing, and need not be there
                part |= {"n_heads_in_group": None, "ffn_mult": None}
        attention = AttentionConfig.build_config_from_dict(own, num_attention_heads)
        mlp = MLPConfig.build_config_from_dict(own, hidden_size)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"block_configs[{number}] = {block} cannot be read ({error!r}); write {EXAMPLE}") from None
    if attention.replace_with_linear or mlp.replace_with_linear:
        raise ValueError(f"block_configs[{number}]: replace_with_linear is not supported")
    sizes = [(attention.no_op, attention.num_query_groups), (mlp.no_op, mlp.ffn_hidden_size)]
    if any(not no_op and (type(size) is not int or size < 1) for no_op, size in sizes):
        raise ValueError(f"block_configs[{number}] = {block} leaves out a size; write {EXAMPLE}")
    groups, width = (None if no_op else int(size or 0) for no_op, size in sizes)
    return Layer(groups, width)


def write_block_configs(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """Return the same layers in the fields that Megatron-Core reads."""
    return [
        {
            "attention": {"no_op": layer.num_query_groups is None, "num_query_groups": layer.num_query_groups},
            "mlp": {"no_op": layer.ffn_hidden_size is None, "ffn_hidden_size": layer.ffn_hidden_size},
        }
        for layer in layers
    ]

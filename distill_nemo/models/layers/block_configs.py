"""What each layer is made of, for models whose layers are alike and for those whose layers differ.

`block_configs` is the format of Nemotron's NAS models, as Megatron-Core reads it: one entry a layer,
`{"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 14336}}`, with `{"no_op": true}` for a part that is
left out. `n_heads_in_group` and `ffn_mult` are understood too.
"""

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.heterogeneous.heterogeneous_config import AttentionConfig, MLPConfig

from distill_nemo.config import ModelConfig

EXAMPLE = '{"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 14336}}, or {"no_op": true} for a part'


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer, of one expert where it has experts; None where it has no attention, or no MLP."""

    num_query_groups: int | None
    ffn_hidden_size: int | None


def layers(model: ModelConfig) -> list[Layer]:
    """Every layer of a resolved model.

    Raises:
        ValueError: for `block_configs` that cannot be read, naming the layer.
    """
    m: Any = model
    if m.block_configs is None:
        return [Layer(m.num_query_groups, m.moe_ffn_hidden_size or m.ffn_hidden_size)] * m.num_layers
    if len(m.block_configs) != m.num_layers:
        raise ValueError(f"block_configs has {len(m.block_configs)} entries, num_layers = {m.num_layers}")
    return [_layer(i, block, m) for i, block in enumerate(m.block_configs)]


def _layer(number: int, block: dict[str, Any], m: Any) -> Layer:
    try:
        own = copy.deepcopy(block)  # Megatron pops from it
        for part in (own["attention"], own.get("ffn") or own["mlp"]):
            if part.get("no_op"):  # its other fields mean nothing, and need not be there
                part |= {"n_heads_in_group": None, "ffn_mult": None}
        attention = AttentionConfig.build_config_from_dict(own, m.num_attention_heads)
        mlp = MLPConfig.build_config_from_dict(own, m.hidden_size)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"block_configs[{number}] = {block} cannot be read ({error!r}); write {EXAMPLE}") from None
    if attention.replace_with_linear or mlp.replace_with_linear:
        raise ValueError(f"block_configs[{number}]: replace_with_linear is not supported")
    sizes = [(attention.no_op, attention.num_query_groups), (mlp.no_op, mlp.ffn_hidden_size)]
    if any(not no_op and (type(size) is not int or size < 1) for no_op, size in sizes):
        raise ValueError(f"block_configs[{number}] = {block} leaves out a size; write {EXAMPLE}")
    groups, width = (None if no_op else int(size or 0) for no_op, size in sizes)
    return Layer(groups, width)


def as_megatron(model: ModelConfig) -> list[dict[str, Any]]:
    """`block_configs` as Megatron-Core wants them."""
    return [
        {
            "attention": {"no_op": layer.num_query_groups is None, "num_query_groups": layer.num_query_groups},
            "mlp": {"no_op": layer.ffn_hidden_size is None, "ffn_hidden_size": layer.ffn_hidden_size},
        }
        for layer in layers(model)
    ]

"""Rotary embeddings in `config.json`, by the precedence of transformers 5.

`rope_scaling`, where it is not empty, replaces `rope_parameters`. A `rope_theta` in the dictionary goes before the one
beside it: transformers 4 rewrites a configuration of transformers 5 with its own default, 10000, at the top.
`rope_type` goes before `type`. Llama 3's scaling is supported, with the constants that Megatron-Core has.
"""

from typing import Any

from distill_nemo.models.config_fields import MAX_NUMBER, Fields, is_number, shown

# Megatron-Core knows no other values.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEFAULT_THETA = 10000.0


def read_rope(config: Fields) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling (None without) of a Hugging Face configuration.

    Raises:
        ValueError: for what Megatron-Core does not compute, and for what transformers' versions read differently:
            nested dictionaries for each type of layer, a null as base or type.
    """
    rope = config.mapping("rope_scaling")
    if not rope.values:
        rope = config.mapping("rope_parameters")
    nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{rope.where}: {shown(nested)} holds parameters for one type of layer, which is not supported: "
            "state those of all layers directly in it"
        )
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            given = fields.values["partial_rotary_factor"]
            raise ValueError(f"{fields.where}: partial_rotary_factor = {given} is not supported; 1.0 is")
    base = _theta(rope if "rope_theta" in rope.values else config)
    kind = rope.text("rope_type" if "rope_type" in rope.values else "type", "default")
    if kind == "default":
        return base, None
    if config.values.get("original_max_position_embeddings") not in (
        None,
        LLAMA3_ROPE["original_max_position_embeddings"],
    ):  # transformers 5 takes it in place of the one in the dictionary
        raise config.wrong("original_max_position_embeddings", f"{LLAMA3_ROPE['original_max_position_embeddings']}")
    names = ("factor", *LLAMA3_ROPE)
    scaling = {"rope_type": kind} | {name: rope.values[name] for name in names if name in rope.values}
    check_rope_scaling(scaling, rope.where)
    return base, scaling


def _theta(fields: Fields) -> float:
    return fields.number("rope_theta") if "rope_theta" in fields.values else DEFAULT_THETA


def check_rope_scaling(scaling: dict[str, Any] | None, where: str = "rope_scaling") -> None:
    """Refuse all but what Megatron-Core computes, by name."""
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise ValueError(f'{where}: type "{kind!s:.40}" is not supported; "llama3" and "default" are')
    for name, value in LLAMA3_ROPE.items():
        if scaling.get(name) != value:
            raise ValueError(f"{where}.{name} = {shown(scaling.get(name))}: Megatron-Core knows {value} only")
    factor = scaling.get("factor")
    if not is_number(factor) or not 1 <= factor <= MAX_NUMBER:
        raise ValueError(f"{where}.factor must be a number of at least 1, got {shown(factor)}")

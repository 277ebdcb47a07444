"""Rotary embeddings in `config.json`, by the precedence of transformers 5.

A `rope_scaling` that is not empty replaces `rope_parameters`. A `rope_theta` in the dictionary overrides the one
beside it: transformers 4 rewrites a configuration of transformers 5 with its own default, 10000, at the top.
`rope_type` overrides `type`. Other fields that stand both in the dictionary and beside it must agree.
"""

from typing import Any

from distill_nemo.models.architecture import Architecture, Rope, RopeType
from distill_nemo.models.config_fields import MAX_POSITIONS, Fields, shown
from distill_nemo.models.families.family import Family

DEFAULT_THETA = 10000.0
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
# Fields of config.json that `write_rope` may write.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", PARTIAL, ORIGINAL)
# By type: required fields, and optional ones.
TYPE_FIELDS: dict[RopeType, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", ORIGINAL), ("factor", "attention_factor")),
}


def read_rope(config: Fields, family: Family) -> tuple[float, dict[str, Any] | None]:
    """Return `rotary_base` and `rope_scaling` (or None) of a Hugging Face configuration.

    Raises:
        ValueError: for an embedding that would be computed differently from transformers, and for one that its versions
            read differently: a null as base or type, contradictions between the dictionary and fields beside it.
    """
    if not family.rope_types:
        return DEFAULT_THETA, None
    rope = config.mapping("rope_scaling")
    if not rope.values:
        rope = config.mapping("rope_parameters")
    nested = _nested(rope, family)
    if not nested:
        read = _read(_completed(rope, config, DEFAULT_THETA, family), family)
        return read.rope_theta, _scaling(read, family)
    base = _theta(config, DEFAULT_THETA)
    return base, {kind: _read(_completed(own, config, base, family), family).stated for kind, own in nested.items()}


def parameters_by_type(config: Fields, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what `rope_parameters` states for each type of layer.

    Raises:
        ValueError: for parameters of all layers together, which transformers overlooks in part.
    """
    rope = config.mapping("rope_parameters")
    if rope.values.keys() - {*kinds} and not rope.values.keys() >= {*kinds}:
        raise ValueError(f"{rope.where} must hold {' and '.join(kinds)}, got {shown([*rope.values])}")
    return {kind: dict(rope.mapping(kind).values) for kind in kinds}


def resolve_ropes(base: float, scaling: dict[str, Any] | None, family: Family) -> tuple[Rope, ...]:
    """Return the rotary embeddings of `rotary_base` and `rope_scaling`, one for each of the family's `layer_ropes`.

    Raises:
        ValueError: for fields that are missing, unknown or of the wrong kind, by name.
    """
    if not family.rope_types:
        if scaling is not None:
            raise ValueError(f'rope_scaling: family "{family.model_type}" has no rotary embeddings')
        return ()
    fields = Fields(scaling or {}, "rope_scaling")
    nested = _nested(fields, family)
    if nested:
        return tuple(_read(nested[kind], family, strict=True) for kind in family.layer_ropes)
    if "rope_theta" in fields.values:
        raise ValueError("rope_scaling: rope_theta is not read here; set rotary_base")
    rope = _read(Fields(fields.values | {"rope_theta": base}, fields.where), family, strict=True)
    return (rope,) * max(1, len(family.layer_ropes))


def write_rope(model: Architecture) -> dict[str, Any]:
    """Return the fields of `config.json` for transformers 4 and 5, which read some beside the dictionary.

    They are none without rotary embeddings.
    """
    scaling = model.rope_scaling or {}
    if not model.ropes:
        return {}
    if any(isinstance(own, dict) for own in scaling.values()):
        return {"rope_theta": model.rotary_base, "rope_scaling": None, "rope_parameters": scaling}
    (rope, *_) = model.ropes
    if rope.partial_rotary_factor != 1.0:
        scaling = {PARTIAL: rope.partial_rotary_factor, **scaling}
    beside = (PARTIAL, ORIGINAL) if rope.rope_type == "longrope" else (PARTIAL,)
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": None if rope.rope_type == "default" else model.rope_scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default", **scaling},
        **{name: scaling[name] for name in beside if name in scaling},
    }


def _nested(rope: Fields, family: Family) -> dict[str, Fields]:
    """Return the parameters of each type of layer; empty if all layers have the same."""
    nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
    if nested and not family.layer_ropes:
        raise ValueError(
            f"{rope.where}: {shown(nested)} holds parameters for one type of layer, which is not supported: "
            "state those of all layers directly in it"
        )
    # If all layers are of one type, transformers 5 writes a base and a type beside, and reads neither.
    if nested and not set(nested) == rope.values.keys() - {"rope_theta", "rope_type"} == set(family.layer_ropes):
        wanted = " and one for ".join(family.layer_ropes)
        raise ValueError(f"{rope.where} must hold one object for {wanted}, got {shown(rope.values)}")
    for name in nested:
        if rope.mapping(name).values.get("truncate") is False:
            raise ValueError(f"{rope.where}: {name}.truncate = False is not supported: transformers ignores it")
    return {name: rope.mapping(name) for name in nested}


def _completed(rope: Fields, config: Fields, base: float, family: Family) -> Fields:
    """Complete a dictionary with the fields beside it and with transformers' defaults.

    With a type other than default, transformers reads a family's own `partial_rotary_factor` before the dictionary's.
    """
    values = dict(rope.values)
    values.setdefault("rope_theta", _theta(config, base))
    usual = family.partial_rotary if family.partial_rotary != 1.0 else None
    if usual is not None and config.values.get(PARTIAL, usual) is None:
        raise ValueError(
            f"{config.where}: {PARTIAL} = null is not supported: transformers takes it for 1, and its absence for "
            f"{usual:g}; correct the file"
        )
    scaled = rope.values.get("rope_type", rope.values.get("type", "default")) != "default"
    for name, default in ((PARTIAL, usual if scaled else None), (ORIGINAL, None)):
        inner, outer = rope.values.get(name), config.values.get(name, default)
        if None not in (inner, outer) and inner != outer:
            beside = "beside it" if name in config.values else "of the family, as none stands beside it"
            raise ValueError(
                f"{rope.where}: {name} = {shown(inner)} contradicts {shown(outer)} {beside}; transformers' versions "
                "read different ones: correct the file"
            )
        if inner is None and outer is not None:
            values[name] = outer
    if values.get(ORIGINAL) is None:
        values[ORIGINAL] = config.values.get("max_position_embeddings")
    return Fields(values, rope.where)


def _theta(fields: Fields, default: float) -> float:
    return fields.number("rope_theta") if "rope_theta" in fields.values else default


def _read(rope: Fields, family: Family, *, strict: bool = False) -> Rope:
    """Read a dictionary that states its base. With `strict`, refuse fields that its type does not have."""
    named = rope.text("rope_type" if "rope_type" in rope.values else "type", "default")
    if named not in family.rope_types:
        known = ", ".join(f'"{name}"' for name in family.rope_types)
        raise ValueError(f'{rope.where}: type "{named:.40}" is not supported; {known} are')
    kind = family.rope_types[named]
    required, optional = TYPE_FIELDS[kind]
    allowed = ("rope_theta", "rope_type", "type", PARTIAL, *required, *optional)
    unknown = [name for name in rope.values if name not in allowed]
    if strict and unknown:
        raise ValueError(f"{rope.where}: {shown(unknown)} is not read with type {kind}; it has {', '.join(allowed)}")
    names = [*required, *(name for name in optional if rope.values.get(name) is not None)]
    partial = rope.number(PARTIAL, family.partial_rotary or 1.0)
    if partial > 1 or (partial < 1 and not family.partial_rotary):
        supported = "at most 1" if family.partial_rotary else f'1 with family "{family.model_type}"'
        raise ValueError(f"{rope.where}: {PARTIAL} = {partial:g} is not supported; it must be {supported}")
    values: dict[str, Any] = {name: _value(rope, name) for name in names}
    return Rope(rope.number("rope_theta"), kind, partial, **values)


def _value(rope: Fields, name: str) -> float | int | bool | tuple[float, ...]:
    if name == ORIGINAL:
        return rope.integer(name, most=MAX_POSITIONS)
    if name == "truncate":
        return rope.flag(name)
    if name in ("short_factor", "long_factor"):
        return rope.numbers(name)
    value = rope.number(name)
    if name == "factor" and value < 1:
        raise rope.wrong(name, "at least 1")
    return value


def _scaling(rope: Rope, family: Family) -> dict[str, Any] | None:
    stated = {name: value for name, value in rope.stated.items() if name not in ("rope_theta", PARTIAL)}
    if rope.partial_rotary_factor != (family.partial_rotary or 1.0):
        stated[PARTIAL] = rope.partial_rotary_factor
    return None if stated == {"rope_type": "default"} else stated

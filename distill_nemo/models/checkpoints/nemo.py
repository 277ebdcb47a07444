"""Read `ModelConfig` fields from `model_config.yaml` of NeMo 1, NeMo 2 and ModelOpt."""

import re
from pathlib import Path
from typing import Any

import yaml

from distill_nemo.models.config_fields import shown
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.pieces import layer_table
from distill_nemo.runtime.files import why_unreadable

INTEGER_FIELDS = {  # our name: NeMo's names, of which the first with a value is used
    "num_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("ffn_hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_query_groups",),
    "kv_channels": ("kv_channels",),
    "vocab_size": ("override_vocab_size", "vocab_size"),  # before padding; NeMo mostly leaves it to the tokenizer
    "max_position_embeddings": ("max_position_embeddings", "encoder_seq_length", "seq_length"),
}
FLOAT_FIELDS = {"rotary_base": ("rotary_base",), "norm_epsilon": ("layernorm_epsilon", "norm_epsilon")}
# Constants of Megatron-Core's rotary embedding.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SWIGLU = ("swiglu", "fast-swiglu")
# Supported values, in lower case. A field may be absent: the tensors show what it would state.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "mcore_gpt": (True,),
    "normalization": ("rmsnorm",),
    "activation": SWIGLU,
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "bias": (False,),
    "add_bias_linear": (False,),
    "disable_bias_linear": (True,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percentage": (1,),
    "rotary_percent": (1,),
    "rotary_interleaved": (False,),
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "multi_latent_attention": (False,),
    "window_size": (),
    "normalize_attention_scores": (True,),
    "apply_embedding_scaling": (False,),
    "headscale": (False,),
    "num_moe_experts": (0,),
    "num_experts": (0,),
}


def read_nemo_config(path: Path) -> dict[str, Any]:
    """Return the `ModelConfig` fields that the file states. It often leaves out the vocabulary.

    Raises:
        ValueError: if the file cannot be read, or a field has an unsupported value, by name.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {why_unreadable(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields")
    values = {name: _interpolated(value, values) for name, value in values.items()}
    if values.get("group_query_attention") is False:  # Megatron's arguments then hold a num_query_groups of 1
        values["num_query_groups"] = None
    for name, allowed in ALLOWED.items():
        given = values.get(name)
        given = given.lower() if isinstance(given, str) else given
        if given is not None and given not in allowed:
            what = " or ".join(str(value) for value in allowed) or "null"
            raise ValueError(f"{path}: {name} = {shown(values[name]).strip("'")} is not supported; {what} is")
    described: dict[str, Any] = {
        ours: _number(path, int, name, values[name]) for ours, name in _stated(INTEGER_FIELDS, values)
    }
    described |= {ours: _number(path, float, name, values[name]) for ours, name in _stated(FLOAT_FIELDS, values)}
    described |= {"family": _family(path, values), "rope_scaling": _rope_scaling(path, values)}
    for name, tied in (("untie_embeddings_and_output_weights", False), ("share_embeddings_and_output_weights", True)):
        if values.get(name) is not None:
            if not isinstance(values[name], bool):
                raise ValueError(f"{path}: {name} must be true or false, got {shown(values[name])}")
            described["tie_word_embeddings"] = values[name] is tied
    return described


def _interpolated(value: Any, values: dict[str, Any]) -> Any:
    """Resolve OmegaConf's `${.encoder_seq_length}` within the file. Others stay, and are refused where used."""
    named = re.fullmatch(r"\$\{\.?(\w+)\}", value) if isinstance(value, str) else None
    return values.get(named[1]) if named else value


def _stated(fields: dict[str, tuple[str, ...]], values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (our name, NeMo's name) of each field that has a value."""
    found = [(ours, [name for name in names if values.get(name) is not None]) for ours, names in fields.items()]
    return [(ours, names[0]) for ours, names in found if names]


def _number[T: (int, float)](path: Path, kind: type[T], name: str, value: Any) -> T:
    """Return a positive number. YAML 1.1 reads 1e-5, without a dot, as text."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number <= 0 or isinstance(value, bool) or number != float(value):
        raise ValueError(
            f"{path}: {name} must be a positive {'integer' if kind is int else 'number'}, got {shown(value)}"
        )
    return number


def _family(path: Path, values: dict[str, Any]) -> str:
    """Return the dense family with Llama's layers that has this bias and these norms. The file names no family."""
    qkv_bias, qk_norm = (
        bool(value) for value in (values.get("add_qkv_bias") or values.get("qkv_bias"), values.get("qk_layernorm"))
    )
    for name, family in FAMILIES.items():
        described = family.layer_table is layer_table and not (family.experts or family.needs_own_fields)
        if described and (family.qkv_bias, family.qk_norm) == (qkv_bias, qk_norm):
            return name
    raise ValueError(f"{path}: qk_layernorm together with a bias of queries, keys and values is not supported")


def _rope_scaling(path: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return Llama 3's scaling, for which NeMo 1, Megatron and NeMo 2 have different switches, or a linear one."""
    factor = values.get("rope_scaling_factor") or values.get("scale_factor")
    switches = [values.get(name) for name in ("scale_positional_embedding", "use_rope_scaling", "rope_scaling")]
    interpolation = values.get("seq_len_interpolation_factor")
    linear = 1.0 if interpolation is None else _number(path, float, "seq_len_interpolation_factor", interpolation)
    if not any(switches) and values.get("scale_factor") is None:
        return None if linear == 1.0 else {"rope_type": "linear", "factor": linear}
    if linear != 1.0:
        raise ValueError(f"{path}: seq_len_interpolation_factor = {linear:g} together with Llama 3's is not supported")
    factor = _number(path, float, "factor of rope scaling", factor or 8.0)
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}

"""Read and write Hugging Face `config.json`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_nemo.fields import suggest
from distill_nemo.models.architecture import EXPERT_FIELDS, Architecture
from distill_nemo.models.config_fields import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Fields, shown
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.family import Family, Wrapper, resolve_own_fields
from distill_nemo.models.families.rope import read_rope, write_rope
from distill_nemo.models.stored_quantization import FIELD, read_stored_quantization, with_modelopt
from distill_nemo.runtime.files import read_object

if TYPE_CHECKING:
    import torch

MAX_LABELS = 100_000


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a `config.json`; of a model of images and text, the part that describes its text model.

    Raises:
        ValueError: if the file cannot be read, or does not describe a text model.
    """
    config = with_modelopt(read_object(file), file.parent)
    for family in FAMILIES.values():
        if family.wrapper is not None and config.get("model_type") == family.wrapper.model_type:
            return _text_config(Fields(config, str(file)), family, family.wrapper)
    return config


def _text_config(config: Fields, family: Family, wrapper: Wrapper) -> dict[str, Any]:
    _check_class(config, wrapper.model_type, wrapper.hf_class)
    text = config.mapping("text_config")
    if not text.values:
        raise config.wrong("text_config", "an object that describes the text model")
    if text.text("model_type", family.model_type) != family.model_type:
        raise text.wrong("model_type", f'"{family.model_type}"')
    around = {FIELD: config.values[FIELD]} if config.values.get(FIELD) else {}
    return {"model_type": family.model_type, **text.values, **around}


def _check_class(config: Fields, model_type: str, hf_class: str) -> None:
    named = config.values.get("architectures")
    if named and named != [hf_class]:
        raise ValueError(
            f'{config.where}: architectures {shown(named)} is not supported; with model_type "{model_type}" it '
            f'must be ["{hf_class}"], null or absent'
        )


def from_huggingface(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a Hugging Face config.

    Args:
        config: content of config.json, unchecked.
        where: its directory, for messages.

    Raises:
        ValueError: for a model type or a feature that is not supported, and a value of the wrong kind, by name.
    """
    fields = Fields(config, str(where / "config.json"))
    family = _family_of(fields)
    fields = Fields(family.defaults | config, fields.where)
    fields = Fields(fields.values | family.spelled(fields), fields.where)
    _refuse_features(family, fields)
    read_stored_quantization(config, fields.where)
    fields.integer("num_labels", 2, most=MAX_LABELS)  # transformers names each one as soon as it opens the file
    heads = fields.integer("num_attention_heads", most=MAX_HEADS)
    base, scaling = read_rope(fields, family)
    described = {
        "family": family.model_type,
        "num_layers": fields.integer("num_hidden_layers", most=MAX_LAYERS),
        "hidden_size": fields.integer("hidden_size"),
        "ffn_hidden_size": fields.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": fields.integer("num_key_value_heads", heads, most=MAX_HEADS),
        "kv_channels": _head_dim(fields),
        "vocab_size": fields.integer("vocab_size"),
        "max_position_embeddings": fields.integer(
            "max_position_embeddings", family.defaults["max_position_embeddings"], most=MAX_POSITIONS
        ),
        "rotary_base": base,
        "rope_scaling": scaling,
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        **dict.fromkeys(("block_configs", *EXPERT_FIELDS)),
        **family.read_own(fields),
    }
    own = {name: value for name, value in (config | family.spelled(fields)).items() if name in family.own_names}
    return described | {"family_fields": resolve_own_fields(family, own, described, f"{fields.where}: ")}


def _family_of(config: Fields) -> Family:
    model_type = config.text("model_type")
    for family in FAMILIES.values():
        if model_type in (family.model_type, *family.other_types):
            return family
    raise ValueError(f'{config.where}: model_type "{model_type:.40}" is not supported.{suggest(model_type, FAMILIES)}')


def _refuse_features(family: Family, fields: Fields) -> None:
    """Refuse features that would be computed differently from transformers."""
    config = fields.values
    kinds = config.get("layer_types")
    _check_class(fields, family.model_type, family.hf_class)
    activation = fields.text("hidden_act", family.activation)
    refused = {
        **family.refused(fields),
        "attention_bias": not (family.qkv_bias or "attention_bias" in family.own_names)
        and fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
        "sliding window attention (use_sliding_window)": "use_sliding_window" not in family.own_names
        and fields.flag("use_sliding_window"),
        f"sliding window attention (layer_types {shown(kinds)})": "layer_types" not in family.own_names
        and not _all_full_attention(kinds),
        f"hidden_act {activation}": activation != family.activation,
    }
    for feature, used in refused.items():
        if used:
            raise ValueError(f"{fields.where}: {feature} is not supported")


def _all_full_attention(kinds: Any) -> bool:
    return kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))


def _head_dim(fields: Fields) -> int:
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if fields.values.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{fields.where}: hidden_size = {width} is not divisible by num_attention_heads = {heads}; state head_dim"
        )
    return fields.integer("head_dim", width // heads)


def to_huggingface(model: Architecture, dtype: "torch.dtype") -> dict[str, Any]:
    """Return `config.json` of an exported model."""
    family = FAMILIES[model.family]
    return {
        "architectures": [family.hf_class],
        "model_type": model.family,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        **write_rope(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": model.activation,
        "bos_token_id": None,  # else LlamaConfig takes 1 and 2, whatever the tokenizer, and generation stops at 2
        "eos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # its name in transformers 4
        **model.family_fields,
        **family.write_own(model),
    }

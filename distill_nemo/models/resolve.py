"""Resolve a model: its config and its checkpoint's own description become an `Architecture`, once a rank."""

import dataclasses
from math import isfinite
from pathlib import Path
from typing import Any

from distill_nemo.config import ModelConfig, StudentConfig, TeacherConfig
from distill_nemo.config_files import from_dict
from distill_nemo.fields import suggest
from distill_nemo.models.architecture import EXPERT_FIELDS, Architecture, Layer, Models, Rope
from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors, has_weights
from distill_nemo.models.checkpoints.nemo import read_nemo_config
from distill_nemo.models.config_fields import (
    MAX_EXPERTS,
    MAX_EXPERTS_IN_ALL_LAYERS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_NUMBER,
    MAX_POSITIONS,
    MAX_SIZE,
)
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.family import Family, resolve_own_fields
from distill_nemo.models.families.huggingface import from_huggingface, read_config
from distill_nemo.models.families.rope import resolve_ropes
from distill_nemo.models.layers.block_configs import read_block_configs
from distill_nemo.models.layers.rotary import frequencies
from distill_nemo.models.layouts import linear_layers
from distill_nemo.models.sources import QUANTIZATION, CheckpointKind, Source, find_checkpoint
from distill_nemo.quantization import QuantizationConfig, check_exclude, is_quantized, is_same
from distill_nemo.runtime.files import read_object
from distill_nemo.runtime.process_groups import rank

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_ffn_hidden_size")
NOT_IN_TENSORS = ("rotary_base", "norm_epsilon")  # a wrong default would load without an error, and give other logits
MORE_ROWS = 0.01  # fraction of the student's vocabulary that a teacher may have on top: taken for padding
UPPER_LIMITS = {
    "num_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_query_groups": MAX_HEADS,
    "num_experts": MAX_EXPERTS,
    "num_experts_per_tok": MAX_EXPERTS,
    "max_position_embeddings": MAX_POSITIONS,
}
TRAITS = (  # of families
    *("qkv_bias", "linear_bias", "qk_norm", "wide_qk_norm", "attention_sinks", "output_gate"),
    *("pre_norms", "post_norms", "activation", "gated"),
)
WITHOUT_DEFAULT = ("rope_scaling", "block_configs", *EXPERT_SIZES)  # None means that the model has none


def resolve(model: ModelConfig | Architecture) -> Architecture:
    """Fill in every field from the checkpoint's own description, else by default. Return an architecture unchanged.

    Raises:
        ValueError: if the checkpoint is missing or its architecture unsupported, a field contradicts it, a required
            field has no value, or a Hugging Face checkpoint's tensors do not fit its config. The message names the
            checkpoint or, of random weights, the field as a run states it: student.num_layers.
    """
    if isinstance(model, Architecture):
        return model
    try:
        return _resolve(model)
    except ValueError as error:
        if model.checkpoint is None:
            raise ValueError(_of_role(_role(model), str(error))) from None
        if model.checkpoint in str(error):
            raise
        raise ValueError(f"{model.checkpoint}: {error}") from None


def _role(model: ModelConfig) -> str:
    return type(model).__name__.removesuffix("Config").lower()


def _of_role(role: str, message: str) -> str:
    """Return a message about a model without a name, whose field, where it begins with one, has its section."""
    message = message.removeprefix(f"{role}: ")
    names_field = message.partition(" ")[0].rstrip(":") in {field.name for field in dataclasses.fields(ModelConfig)}
    return f"{role}{'.' if names_field else ': '}{message}"


def _resolve(model: ModelConfig) -> Architecture:
    source, described = read_source(model.checkpoint) if model.checkpoint else (None, {})
    values = dataclasses.asdict(model)
    stated = described.pop("family_fields", None)
    for name, value in described.items():
        given = values[name]
        fewer_rows = name == "vocab_size" and given is not None and given < value  # the last ones are left out
        if given is not None and name not in ("init_std", "checkpoint") and given != value and not fewer_rows:
            raise ValueError(f"{name} = {given} contradicts {model.checkpoint}, which says {value}; leave it unset")
        if given is None:
            values[name] = value
    _check_complete(model.checkpoint, values, described)
    name = model.checkpoint or _role(model)
    _check_sizes(name, values)
    values |= {field: value for field, value in _defaults(values).items() if values[field] is None}
    _check_values(name, values)
    values["family_fields"] = _family_fields(model, stated, values)
    resolved = _architecture(name, source, values)
    _check_ropes(resolved)
    if source is not None and source.kind is CheckpointKind.HUGGING_FACE and has_weights(source.weights):
        return with_headers(resolved)
    return resolved


def _family_fields(model: ModelConfig, stated: dict[str, Any] | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return the family's own fields. The config may repeat, but not contradict, those of the checkpoint."""
    family, given = FAMILIES[values["family"]], model.family_fields or {}
    own = resolve_own_fields(family, (stated or {}) | given, values)
    if stated is not None and own != (found := resolve_own_fields(family, stated, values)):
        raise ValueError(f"family_fields = {given} contradicts {model.checkpoint}, which says {found}; leave it unset")
    return own


def with_headers(model: Architecture) -> Architecture:
    """Read the safetensors headers of a model's Hugging Face directory, and compare them with the architecture.

    Raises:
        ValueError: as `check_hf_tensors` does.
    """
    assert model.source is not None
    tensors = check_hf_tensors(model.source.weights, model.as_stored)
    return dataclasses.replace(model, source=dataclasses.replace(model.source, tensors=tensors))


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "llama",
        "norm_topk_prob": True if _has_experts(values) else None,
        "num_query_groups": values["num_attention_heads"],
        "kv_channels": values["hidden_size"] // values["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }


def _architecture(name: str, source: Source | None, values: dict[str, Any]) -> Architecture:
    family = FAMILIES[values["family"]]
    own = {field.name for field in dataclasses.fields(Architecture)}
    layers = _layers(values)
    if values["ffn_hidden_size"] is None:
        if not all(layer.has_experts for layer in layers):
            raise ValueError(f"{name}: some of its layers have no experts; set ffn_hidden_size, the width of their MLP")
        values["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    traits = {trait: getattr(family, trait) for trait in TRAITS} | family.traits(values)
    return Architecture(
        name=name,
        source=source,
        quantization=source.quantization if source else None,
        ropes=_ropes(name, values, family),
        layers=layers,
        experts=family.experts(values) if family.experts and _has_experts(values) else None,
        delta_net=family.delta_net(values) if family.delta_net else None,
        multipliers=family.multipliers(values),
        mamba=family.mamba(values) if family.mamba else None,
        latent=family.latent(values) if family.latent else None,
        **traits,
        **{field: value for field, value in values.items() if field in own},
    )


def _ropes(name: str, values: dict[str, Any], family: Family) -> tuple[Rope, ...]:
    try:
        return resolve_ropes(values["rotary_base"], values["rope_scaling"], family)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_ropes(model: Architecture) -> None:
    """Refuse rotary embeddings that give no frequencies."""
    try:
        for rope in model.ropes:
            frequencies(rope, model.rotary_channels, model.max_position_embeddings)
    except ValueError as error:
        raise ValueError(f"{model.name}: {error}") from None


def _layers(values: dict[str, Any]) -> tuple[Layer, ...]:
    blocks, count = values["block_configs"], values["num_layers"]
    if blocks is None:
        has_experts = _has_experts(values)
        width = values["moe_ffn_hidden_size" if has_experts else "ffn_hidden_size"]
        same = Layer(values["num_query_groups"], width, has_experts=has_experts)
        layers = (same,) * count
    elif len(blocks) != count:
        raise ValueError(f"block_configs has {len(blocks)} entries, num_layers = {count}")
    else:
        layers = read_block_configs(blocks, values["num_attention_heads"], values["hidden_size"])
    return FAMILIES[values["family"]].layers(values, layers)


def _has_experts(values: dict[str, Any]) -> bool:
    family = FAMILIES.get(values["family"])
    if family is None or family.experts is None:
        return False
    return not family.may_be_dense or values["num_experts"] is not None


def _check_complete(checkpoint: str | None, values: dict[str, Any], described: dict[str, Any]) -> None:
    silent = checkpoint is not None and not described
    moe = _has_experts(values)
    required = [name for name in REQUIRED if not (moe and name == "ffn_hidden_size")]
    required += EXPERT_SIZES if moe else ()
    if silent:
        required += [*NOT_IN_TENSORS, *(["norm_topk_prob"] if moe else [])]
        if values["family"] in FAMILIES and FAMILIES[values["family"]].needs_own_fields:
            required.append("family_fields")
    missing = [name for name in required if values[name] is None]
    if missing and checkpoint is None:
        raise ValueError(f"the model needs {', '.join(missing)}: set them, or checkpoint to read them from")
    if missing:
        raise ValueError(f"{checkpoint} does not say {', '.join(missing)}: set them beside checkpoint")


def _check_sizes(model: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) in (int, float) and not (isfinite(value) and value > 0):
            raise ValueError(f"{model}: {name} must be above 0, got {value}")
        if type(value) in (int, float) and value > (
            most := UPPER_LIMITS.get(name, MAX_SIZE if isinstance(value, int) else MAX_NUMBER)
        ):
            raise ValueError(f"{model}: {name} must be at most {most:,}, got {value}")
    experts = values["num_layers"] * (values["num_experts"] or 0)
    if experts > MAX_EXPERTS_IN_ALL_LAYERS:
        raise ValueError(
            f"{model}: num_layers = {values['num_layers']} times num_experts = {values['num_experts']} must be at most "
            f"{MAX_EXPERTS_IN_ALL_LAYERS:,}"
        )


def _check_values(name: str, values: dict[str, Any]) -> None:
    """Refuse values that contradict each other, defaults filled in."""
    if values["family"] not in FAMILIES:
        raise ValueError(f'family "{values["family"]}" is not known.{suggest(str(values["family"]), FAMILIES)}')
    heads, groups = values["num_attention_heads"], values["num_query_groups"]
    if heads % groups:
        raise ValueError(f"num_attention_heads = {heads} is not divisible by num_query_groups = {groups}")
    if _has_experts(values):
        _check_experts(values)
    elif given := [f"{field} = {values[field]}" for field in EXPERT_FIELDS if values[field] is not None]:
        if FAMILIES[values["family"]].may_be_dense:
            raise ValueError(f"{', '.join(given)}: set num_experts, too; without it a model has no experts")
        having = " or ".join(name for name, family in FAMILIES.items() if family.experts)
        raise ValueError(f'{", ".join(given)}: family "{values["family"]}" has no experts; {having} has')


def _check_experts(values: dict[str, Any]) -> None:
    """Refuse counts that make no mixture, and mixtures that Megatron-Core does not compute as transformers does."""
    for name in EXPERT_SIZES:
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
    experts, chosen = values["num_experts"], values["num_experts_per_tok"]
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok = {chosen} is above num_experts = {experts}")
    if chosen == 1 and values["norm_topk_prob"]:
        raise ValueError(
            "norm_topk_prob = True with num_experts_per_tok = 1 gives every expert the weight 1, which Megatron-Core "
            "refuses: the router would have no gradient. Set norm_topk_prob to False, or num_experts_per_tok above 1"
        )
    if values["block_configs"] is not None:
        raise ValueError(
            f'block_configs: layers that differ are not supported with experts (family "{values["family"]}")'
        )


def read_source(checkpoint: str) -> tuple[Source, dict[str, Any]]:
    """Read a checkpoint's description. Return the source, and the `ModelConfig` fields that it states, if any."""
    found = find_checkpoint(Path(checkpoint))
    config: dict[str, Any] = {}
    described: dict[str, Any] = {}
    quantization: QuantizationConfig | None = None
    if found.description is None:
        pass
    elif found.kind is CheckpointKind.OURS:
        stated, where = read_object(found.description), f"{found.description}: "
        if QUANTIZATION in stated:
            quantization = from_dict(stated.pop(QUANTIZATION), QuantizationConfig, where + f"{QUANTIZATION}.")
        own = dataclasses.asdict(from_dict(stated, StudentConfig, where))
        described = {k: v for k, v in own.items() if k != "checkpoint" and (v is not None or k in WITHOUT_DEFAULT)}
    elif found.kind is CheckpointKind.HUGGING_FACE:
        config = read_config(found.description)
        described = from_huggingface(config, found.weights)
    else:
        described = read_nemo_config(found.description)
    return Source(checkpoint, found.kind, found.weights, config, described.get("vocab_size"), quantization), described


def quantized_as(model: Architecture, config: QuantizationConfig) -> Architecture:
    """Return a student as a run quantises it. One that an earlier run has quantised stays as it is.

    Raises:
        ValueError: if it was quantised otherwise, or a pattern of `exclude` matches none of its layers, or they match
            all.
    """
    if not is_quantized(config):
        return model
    layers, stored = [name for name, *_ in linear_layers(model)], model.quantization
    check_exclude(config, layers)
    if stored is not None and is_same(config, stored, layers):
        return model
    if stored is not None:
        before, now = dataclasses.asdict(stored), dataclasses.asdict(config)
        del now["calibration_samples"]  # those of its run gave it its ranges
        changed = [f"{name} = {before[name]!r}, not {now[name]!r}" for name in now if now[name] != before[name]]
        raise ValueError(
            f"{model.name} was quantised by its run with quantization.{', '.join(changed)}: leave quantization unset "
            '(format and kv_cache "none") to go on with that, or take the model that it was made from'
        )
    if model.source is not None and model.source.modified_by_modelopt:
        raise ValueError(f"{model.name} was quantised by ModelOpt already: leave quantization unset")
    return dataclasses.replace(model, quantization=config)


def resolve_pair(student: StudentConfig | Architecture, teacher: TeacherConfig | Architecture | None) -> Models:
    """Resolve both with the student's vocabulary. A teacher's surplus rows are left out, up to `MORE_ROWS`.

    Models of one tokenizer are padded to different sizes (Qwen2.5: 151,936 rows at 1.5B, 152,064 at 7B).

    Raises:
        ValueError: as `resolve` does, and if the vocabularies differ in any other way. The message has both sizes.
    """
    own = resolve(student)
    if teacher is None:
        return Models(own, None)
    other = resolve(teacher)
    more = other.vocab_size - own.vocab_size
    if 0 < more <= MORE_ROWS * own.vocab_size:
        if rank() == 0:
            print(f"teacher: the last {more:,} of its {other.vocab_size:,} ids are left out: the student lacks them")
        other = dataclasses.replace(other, vocab_size=own.vocab_size)
    elif more:
        raise ValueError(
            f"student and teacher must share a vocabulary: student.vocab_size = {own.vocab_size}, "
            f"teacher.vocab_size = {other.vocab_size}; where the last rows of the larger are padding, set both to "
            "the smaller size, which leaves them out"
        )
    return Models(own, other)

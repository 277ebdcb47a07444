"""Resolve a model: fill in every field from its checkpoint's own description.

A `ModelConfig` is *resolved* when every field has a value; all but `resolve` take resolved ones.
"""

import dataclasses
from math import isfinite
from pathlib import Path
from typing import Any

from distill_nemo.config import ModelConfig, StudentConfig, TeacherConfig, from_dict
from distill_nemo.fields import near
from distill_nemo.models.checkpoints.config_fields import (
    MAX_EXPERTS,
    MAX_EXPERTS_IN_ALL_LAYERS,
    MAX_LAYERS,
    MAX_NUMBER,
    MAX_POSITIONS,
    MAX_SIZE,
    read_json,
)
from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors, has_weights
from distill_nemo.models.checkpoints.nemo import read_nemo_config
from distill_nemo.models.checkpoints.sources import CheckpointKind, find_checkpoint
from distill_nemo.models.families.huggingface import FAMILIES, from_huggingface
from distill_nemo.models.families.rope import check_rope_scaling
from distill_nemo.models.layers.block_configs import layers
from distill_nemo.models.layers.experts import MOE_FAMILIES, MOE_SIZES, check_experts
from distill_nemo.runtime.process_groups import rank

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
NOT_IN_TENSORS = ("rotary_base", "norm_epsilon")  # a wrong default would load, and give other logits
VOCAB_MULTIPLE = 128  # whatever the tensor parallel size, so that checkpoints reshard
MORE_ROWS = 0.01  # of the student's vocabulary, that a teacher may have more without being asked: padding, not tokens
MOST = {
    "num_layers": MAX_LAYERS,
    "num_experts": MAX_EXPERTS,
    "num_experts_per_tok": MAX_EXPERTS,
    "max_position_embeddings": MAX_POSITIONS,
}
WITHOUT_DEFAULT = ("rope_scaling", "block_configs", *MOE_SIZES)  # None says that the model has none


def resolve[T: ModelConfig](model: T) -> T:
    """A copy with every field filled in: from the checkpoint's own description, else by default.

    Raises:
        ValueError: when the checkpoint is missing or of an unsupported architecture, when a field contradicts it,
            when a required field has no value, or when a Hugging Face checkpoint's tensors do not fit its config;
            naming the checkpoint, if there is one.
    """
    try:
        return _resolve(model)
    except ValueError as error:
        if model.checkpoint is None or model.checkpoint in str(error):
            raise
        raise ValueError(f"{model.checkpoint}: {error}") from None


def _resolve[T: ModelConfig](model: T) -> T:
    described = describe_checkpoint(Path(model.checkpoint)) if model.checkpoint else {}
    values = dataclasses.asdict(model)
    for name, value in described.items():
        given = values[name]
        fewer_rows = name == "vocab_size" and given is not None and given < value  # the last ones are left out
        if given is not None and name not in ("init_std", "checkpoint") and given != value and not fewer_rows:
            raise ValueError(f"{name} = {given} contradicts {model.checkpoint}, which says {value}; leave it unset")
        if given is None:
            values[name] = value
    _check_complete(model.checkpoint, values, described)
    who = model.checkpoint or type(model).__name__
    _check_sizes(who, values)
    moe = values["family"] in MOE_FAMILIES
    defaults = {
        "family": "llama",
        "ffn_hidden_size": values["moe_ffn_hidden_size"],  # no layer of a mixture of experts has it
        "norm_topk_prob": True if moe else None,
        "num_query_groups": values["num_attention_heads"],
        "kv_channels": values["hidden_size"] // values["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }
    values |= {name: value for name, value in defaults.items() if values[name] is None}
    if values["family"] not in FAMILIES:
        raise ValueError(f'family "{values["family"]}" is not known.{near(str(values["family"]), FAMILIES)}')
    check_rope_scaling(values["rope_scaling"])
    if values["kv_channels"] < 2 or values["kv_channels"] % 2:
        kv_channels = values["kv_channels"]
        raise ValueError(f"{who}: kv_channels = {kv_channels} is not even: rotary embeddings turn pairs of channels")
    heads, groups = values["num_attention_heads"], values["num_query_groups"]
    if heads % groups:
        raise ValueError(f"num_attention_heads = {heads} is not divisible by num_query_groups = {groups}")
    check_experts(values)
    resolved = type(model)(**values)
    layers(resolved)
    _check_stored(resolved, described)
    return resolved


def _check_stored(resolved: ModelConfig, described: dict[str, Any]) -> None:
    """Compare a Hugging Face config with the tensors beside it, if there are any."""
    if resolved.checkpoint is None:
        return
    found = find_checkpoint(Path(resolved.checkpoint))
    if found.kind is CheckpointKind.HUGGING_FACE and has_weights(found.weights):
        check_hf_tensors(found.weights, dataclasses.replace(resolved, vocab_size=described["vocab_size"]))


def _check_complete(checkpoint: str | None, values: dict[str, Any], described: dict[str, Any]) -> None:
    silent = checkpoint is not None and not described
    moe = values["family"] in MOE_FAMILIES
    required = [name for name in REQUIRED if not (moe and name == "ffn_hidden_size")] + [*(MOE_SIZES if moe else ())]
    if silent:
        required += [*NOT_IN_TENSORS, *(["norm_topk_prob"] if moe else [])]
    missing = [name for name in required if values[name] is None]
    if missing and checkpoint is None:
        raise ValueError(f"the model needs {', '.join(missing)}: set them, or checkpoint to read them from")
    if missing:
        raise ValueError(f"{checkpoint} does not say {', '.join(missing)}: set them beside checkpoint")


def _check_sizes(who: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) in (int, float) and not (isfinite(value) and value > 0):
            raise ValueError(f"{who}: {name} must be above 0, got {value}")
        if type(value) in (int, float) and value > (
            most := MOST.get(name, MAX_SIZE if isinstance(value, int) else MAX_NUMBER)
        ):
            raise ValueError(f"{who}: {name} must be at most {most:,}, got {value}")
    experts = values["num_layers"] * (values["num_experts"] or 0)
    if experts > MAX_EXPERTS_IN_ALL_LAYERS:
        raise ValueError(
            f"{who}: num_layers = {values['num_layers']} times num_experts = {values['num_experts']} must be at most "
            f"{MAX_EXPERTS_IN_ALL_LAYERS:,}"
        )


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The architecture that a checkpoint states, by `ModelConfig` field; empty where it states none."""
    found = find_checkpoint(path)
    if found.description is None:
        return {}
    if found.kind is CheckpointKind.OURS:
        stated = from_dict(read_json(found.description), StudentConfig, f"{found.description}: ")
        own = dataclasses.asdict(stated)
        return {k: v for k, v in own.items() if k != "checkpoint" and (v is not None or k in WITHOUT_DEFAULT)}
    if found.kind is CheckpointKind.HUGGING_FACE:
        return from_huggingface(read_json(found.description), found.weights)
    return read_nemo_config(found.description)


def with_stored_vocabulary[T: ModelConfig](model: T) -> T:
    """The resolved model with the `vocab_size` that its checkpoint states, if any: its own may leave rows out."""
    stated = describe_checkpoint(Path(model.checkpoint)).get("vocab_size") if model.checkpoint else None
    return dataclasses.replace(model, vocab_size=stated or model.vocab_size)


def padded_vocab_size(vocab_size: int) -> int:
    """The rows that embedding and output layer really have."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def resolve_pair(student: StudentConfig, teacher: TeacherConfig | None) -> tuple[StudentConfig, TeacherConfig | None]:
    """Both resolved, with the student's vocabulary. A teacher's last rows are left out, up to `MORE_ROWS`.

    Models of one tokenizer are padded to different sizes (Qwen2.5: 151,936 rows at 1.5B, 152,064 at 7B).

    Raises:
        ValueError: as `resolve` does, and when the vocabularies differ otherwise, stating both sizes.
    """
    student = resolve(student)
    if teacher is None:
        return student, None
    teacher = resolve(teacher)
    assert student.vocab_size is not None and teacher.vocab_size is not None, "resolved"
    more = teacher.vocab_size - student.vocab_size
    if 0 < more <= MORE_ROWS * student.vocab_size:
        if rank() == 0:
            print(f"teacher: the last {more:,} of its {teacher.vocab_size:,} ids are left out, which the student lacks")
        teacher.vocab_size = student.vocab_size
    elif more:
        raise ValueError(
            f"student and teacher must share a vocabulary: student.vocab_size = {student.vocab_size}, "
            f"teacher.vocab_size = {teacher.vocab_size}; where the last rows of the larger are padding, set both to "
            "the smaller size, which leaves them out"
        )
    return student, teacher

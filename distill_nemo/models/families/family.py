"""One row of facts about a model family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distill_nemo.models.architecture import Architecture
from distill_nemo.models.config_fields import Fields


@dataclass(frozen=True)
class Family:
    """Models that one class of transformers describes.

    Args:
        model_type: in `config.json`, and `ModelConfig.family`.
        hf_class: in `config.json`, under `architectures`.
        defaults: values of that class for fields that a `config.json` leaves out; a null has another meaning.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: queries and keys are normalised in each head.
        has_experts: every layer is a mixture of experts.
        refused: features that would be computed differently from transformers, and True where a config asks for one.
        read_own: `ModelConfig` fields from fields of `config.json` that other families lack.
        write_own: fields of `config.json` that other families lack.
        tensors_like: model type of the family whose tensor names and merge rules it shares; None: it has its own.
    """

    model_type: str
    hf_class: str
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    has_experts: bool = False
    refused: Callable[[Fields], dict[str, bool]] = lambda config: {}
    read_own: Callable[[Fields], dict[str, Any]] = lambda config: {}
    write_own: Callable[[Architecture], dict[str, Any]] = lambda model: {}
    tensors_like: str | None = None

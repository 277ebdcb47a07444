"""Description of a model family."""

import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self, get_args

from distill_nemo.config_files import from_dict
from distill_nemo.fields import is_union
from distill_nemo.models.architecture import (
    EXPERT_FIELDS,
    Activation,
    Architecture,
    DeltaNet,
    Experts,
    Latent,
    Layer,
    Mamba,
    Multipliers,
    RopeType,
)
from distill_nemo.models.config_fields import MAX_LAYERS, Fields
from distill_nemo.models.families.pieces import Table, layer_table, table_around


@dataclass(frozen=True)
class OwnFields:
    """Fields of `config.json` that other families lack. A family subclasses this and declares them as in `config.py`.

    A field's default is that of transformers. Its type and its range (`setting`) are checked before it is used.
    """

    off_by_default: ClassVar[bool] = False  # True: a checkpoint that states none is taken to use none

    def resolved(self, values: dict[str, Any]) -> Self:
        """Return these fields in canonical form: one spelling per network, with dependent defaults filled in.

        Args:
            values: the model's `ModelConfig` fields, resolved.

        Raises:
            ValueError: for fields that contradict each other, or would be computed differently from transformers.
        """
        return self


def softmax_experts(values: dict[str, Any]) -> Experts:
    """Return experts that nothing but their `ModelConfig` fields describes."""
    return Experts(**{name: values[name] for name in EXPERT_FIELDS})


@dataclass(frozen=True)
class Wrapper:
    """A model of images and text whose `config.json` has that of the text model under `text_config`.

    Only the text model is read. Exports are of the text model's class.

    Args:
        model_type: in `config.json`.
        hf_class: in `config.json`, under `architectures`.
        prefix: before the names of the text model's tensors, in place of `model.`.
    """

    model_type: str
    hf_class: str
    prefix: str


@dataclass(frozen=True)
class Family:
    """Models that one class of transformers describes.

    Args:
        model_type: in `config.json`, and `ModelConfig.family`.
        hf_class: in `config.json`, under `architectures`.
        defaults: values of that class for fields that a `config.json` leaves out; a null has another meaning.
        qkv_bias: queries, keys and values have a bias.
        linear_bias: all other linear layers have a bias too, experts and their router included.
        qk_norm: queries and keys are normalised in each head.
        wide_qk_norm: with `qk_norm`, they are normalised over all heads together.
        attention_sinks: each head has a learned score that its softmax counts and whose value is 0.
        pre_norms: attention and MLP read a normalised residual stream.
        post_norms: outputs of attention and MLP are normalised before they are added to the residual stream.
        output_gate: each channel of attention's output is multiplied by the sigmoid of a gate.
        activation: activation of the MLPs.
        gated: an MLP multiplies its activation with a second projection.
        experts: mixture of experts, from the model's `ModelConfig` fields; None: the family has none.
        may_be_dense: a model of the family has no experts if it states no `num_experts`.
        rope_types: rotary embeddings that its class computes, by their names in `config.json`; empty: no layer has one.
        partial_rotary: default of `partial_rotary_factor`, the fraction of a head's channels that is rotated; None:
            its class rotates all of them.
        layer_ropes: types of layers that may have rotary embeddings of their own, in the order of `Architecture.ropes`.
        spelled: fields of `config.json` as transformers 5 spells them, if other versions differ.
        refused: features that would be computed differently from transformers, mapped to True if a config asks for one.
        read_own: `ModelConfig` fields from fields of `config.json` that other families lack.
        write_own: fields of `config.json` that other families lack.
        own_fields: fields of `config.json` that other families lack, as they are written there.
        layers: completes layers, whose sizes alone are set, from the model's `ModelConfig` fields. If the family has
            experts, they come with experts in all layers.
        latent: sizes of latent attention, from the model's `ModelConfig` fields; None: the family has none.
        mamba: sizes of Mamba mixers, from the model's `ModelConfig` fields; None: the family has none.
        delta_net: gated delta nets, from the model's `ModelConfig` fields; None: the family has none.
        multipliers: constants that a model multiplies by, from its `ModelConfig` fields.
        settings: further fields of Megatron's TransformerConfig, which override the common ones.
        traits: `Architecture` fields that override those above, from the model's `ModelConfig` fields.
        layer_table: tensors of one layer; by default those of Llama.
        reference: values of `config.json` with which transformers computes without CUDA what the authors' kernels do.
        other_names: names under which some directories hold a tensor, mapped to those of the tables.
        table_around: tensors outside the layers; by default those of Llama.
        other_types: further names in `config.json` of the same network.
        wrapper: model of images and text that the family is a part of.
        ignored_tensors: beginnings of names of tensors that its class ignores in a directory.
    """

    model_type: str
    hf_class: str
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    attention_sinks: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    output_gate: bool = False
    activation: Activation = "silu"
    gated: bool = True
    experts: Callable[[dict[str, Any]], Experts] | None = None
    may_be_dense: bool = False
    rope_types: dict[str, RopeType] = field(default_factory=lambda: {name: name for name in get_args(RopeType)})
    partial_rotary: float | None = None
    layer_ropes: tuple[str, ...] = ()
    spelled: Callable[[Fields], dict[str, Any]] = lambda config: {}
    refused: Callable[[Fields], dict[str, bool]] = lambda config: {}
    own_fields: type[OwnFields] = OwnFields
    layers: Callable[[dict[str, Any], tuple[Layer, ...]], tuple[Layer, ...]] = lambda values, layers: layers
    latent: Callable[[dict[str, Any]], Latent] | None = None
    mamba: Callable[[dict[str, Any]], Mamba] | None = None
    delta_net: Callable[[dict[str, Any]], DeltaNet] | None = None
    multipliers: Callable[[dict[str, Any]], Multipliers] = lambda values: Multipliers()
    settings: Callable[[Architecture], dict[str, Any]] = lambda model: {}
    traits: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
    read_own: Callable[[Fields], dict[str, Any]] = lambda config: {}
    write_own: Callable[[Architecture], dict[str, Any]] = lambda model: {}
    layer_table: Callable[[Architecture, Layer], Table] = layer_table
    reference: dict[str, Any] = field(default_factory=dict)
    other_names: dict[str, str] = field(default_factory=dict)
    table_around: Callable[[Architecture], Table] = table_around
    other_types: tuple[str, ...] = ()
    wrapper: Wrapper | None = None
    ignored_tensors: tuple[str, ...] = ()

    @property
    def own_names(self) -> set[str]:
        """Names of its own fields."""
        return {each.name for each in fields(self.own_fields)}

    @property
    def needs_own_fields(self) -> bool:
        """True if a checkpoint must state the family's own fields to describe a model."""
        return bool(self.own_names) and not self.own_fields.off_by_default


def resolve_own_fields(
    family: Family, given: dict[str, Any], values: dict[str, Any], where: str = "family_fields."
) -> dict[str, Any]:
    """Return every field that only the family has.

    Args:
        family: the model's.
        given: stated fields. A null counts as absent, unless the field may be null.
        values: the model's other fields, resolved.
        where: text before a field's name in an error.

    Raises:
        ValueError: for a field that the family lacks, and a wrong or contradictory value, by name.
    """
    hints = typing.get_type_hints(family.own_fields)
    if given and not fields(family.own_fields):
        raise ValueError(f'{where}{next(iter(given))}: family "{family.model_type}" has no fields of its own')
    for name, value in given.items():
        if isinstance(value, list) and len(value) > MAX_LAYERS:
            raise ValueError(f"{where}{name} has {len(value):,} entries; at most {MAX_LAYERS:,} are read, one a layer")
    stated = {name: value for name, value in given.items() if value is not None or is_union(hints.get(name))}
    return asdict(from_dict(stated, family.own_fields, where).resolved(values))

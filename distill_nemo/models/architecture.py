"""The architecture of one model: every size and trait, resolved once and handed down."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from distill_nemo.config import ModelConfig
from distill_nemo.models.sources import Source

VOCAB_MULTIPLE = 128  # at every tensor parallel size, so that checkpoints reshard


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer, of one expert where it has experts; None where it has no attention, or no MLP."""

    num_query_groups: int | None
    ffn_hidden_size: int | None


@dataclass(frozen=True)
class Experts:
    """Mixture of experts, the same in every layer. Fields are named as in `ModelConfig`."""

    num_experts: int
    num_experts_per_tok: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool


EXPERT_FIELDS = tuple(f.name for f in fields(Experts))


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer. Two are equal if they are the same network, whatever they come from.

    Args:
        name: for messages: the checkpoint as the config names it, or the config's class.
        source: the checkpoint that was read; None for random weights.
        family: key of `families.FAMILIES`.
        vocab_size: tokens; the source may have more rows, and Megatron pads them (`padded_vocab_size`).
        rope_scaling: as in config.json; None without.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: queries and keys are normalised in each head.
        layers: sizes of each layer.
        block_configs: `layers` as the config states them; None where all layers are alike.
        experts: None for a dense model.
        family_fields: fields of config.json that only the family has (`Family.own_fields`), all of them.
        init_std: of random weights.
    """

    name: str = field(compare=False)
    source: Source | None = field(compare=False)
    family: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: dict[str, Any] | None
    norm_epsilon: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    layers: tuple[Layer, ...]
    block_configs: list[dict[str, Any]] | None
    experts: Experts | None
    family_fields: dict[str, Any]
    init_std: float

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def mlps_per_token(self) -> int:
        """MLPs that a token passes in a layer: one, or its experts."""
        return 1 if self.experts is None else self.experts.num_experts_per_tok

    @property
    def as_stored(self) -> "Architecture":
        """The same model with every row that its source states; `vocab_size` may leave the last ones out."""
        if self.source is None or self.source.vocab_size is None:
            return self
        return replace(self, vocab_size=self.source.vocab_size)

    def filled[T: ModelConfig](self, config: T) -> T:
        """Return a copy of the model's config with every open field filled in, as a run records it."""
        values = vars(self) | {"num_layers": self.num_layers} | (asdict(self.experts) if self.experts else {})
        return replace(config, **{f.name: values[f.name] for f in fields(config) if f.name in values})


class Models(NamedTuple):
    """Architectures of a run."""

    student: Architecture
    teacher: Architecture | None


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of rows that embedding and output layer have in Megatron."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

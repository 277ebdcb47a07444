"""The architecture of a model: every size and trait, resolved once and passed on."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from distill_nemo.config import ModelConfig
from distill_nemo.models.sources import Source
from distill_nemo.quantization import QuantizationConfig

COMPARED = 64  # tokens; at least as many as imports and exports are compared with transformers on
VOCAB_MULTIPLE = 128  # at every tensor parallel size, so that checkpoints reshard

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, in the fields of `rope_parameters` of transformers 5. Fields that its type lacks are None.

    Args:
        rope_theta: base of the frequencies.
        rope_type: scaling of the frequencies, by transformers' names.
        partial_rotary_factor: fraction of a head's channels that is rotated, from the first one on.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @property
    def stated(self) -> dict[str, Any]:
        """Fields that are set, as a config states them; without `partial_rotary_factor` if it is 1."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        if self.partial_rotary_factor == 1.0:
            del values["partial_rotary_factor"]
        return {name: value for name, value in values.items() if value is not None}


Mixer = Literal["gated_delta_net", "latent_attention", "mamba"]


@dataclass(frozen=True)
class Layer:
    """One layer: a part that mixes tokens, and an MLP or experts. Either may be absent.

    Args:
        num_query_groups: number of key-value heads; None without softmax attention over such heads.
        ffn_hidden_size: width of the MLP, or of one expert; None without an MLP.
        rope: index into `Architecture.ropes`; None if queries and keys are not rotated.
        window: number of tokens that a token attends to, itself included; None: itself and all before it.
        mixer: part that mixes tokens in place of softmax attention over `num_query_groups`; None: no other part.
        has_experts: the MLP is a mixture of experts.
    """

    num_query_groups: int | None
    ffn_hidden_size: int | None
    rope: int | None = 0
    window: int | None = None
    mixer: Mixer | None = None
    has_experts: bool = False


@dataclass(frozen=True)
class Experts:
    """Mixture of experts, the same in every layer that has one. The first four fields are named as in `ModelConfig`.

    Args:
        num_experts: number of experts that a router chooses from.
        num_experts_per_tok: number of experts that process a token, those with the highest scores.
        moe_ffn_hidden_size: width of one of them.
        norm_topk_prob: scores of a token's experts are divided by their sum before they become its weights.
        score_function: scores from the router's logits.
        has_expert_bias: a constant for each expert is added to its score where experts are chosen, not in its weight.
        num_groups: groups of consecutive experts; 1: experts are chosen from all.
        num_chosen_groups: a token's experts are chosen from these groups, those with the highest sums of two scores.
        scaling_factor: factor of the weights.
        fp32_router: logits are computed in fp32, whatever the dtype.
        shared_ffn_hidden_size: width of an MLP that processes every token beside its experts; None: there is none.
        has_shared_gate: the output of that MLP is multiplied by the sigmoid of a product with its input.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    has_expert_bias: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    scaling_factor: float = 1.0
    fp32_router: bool = False
    shared_ffn_hidden_size: int | None = None
    has_shared_gate: bool = False


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 mixers, the same in every layer that has one.

    Args:
        num_heads: number of heads.
        head_dim: channels of a head.
        num_groups: groups of heads that share what is written to and read from their states.
        state_size: numbers that a channel keeps.
        conv_kernel: tokens that the convolution sees, the last one included.
        chunk_size: tokens that the kernel mixes at once; the result does not depend on it.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int
    chunk_size: int

    @property
    def channels(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def convolved(self) -> tuple[int, int, int]:
        """Channels of x, b and c, which are convolved."""
        return self.channels, self.num_groups * self.state_size, self.num_groups * self.state_size

    @property
    def projected(self) -> tuple[int, int, int, int, int]:
        """Channels of z, x, b, c and dt, which are computed from the residual stream."""
        return self.channels, *self.convolved, self.num_heads

    def share(self, size: int) -> "Mamba":
        """Return the sizes on one of `size` tensor-parallel ranks, which share the groups."""
        return replace(self, num_heads=self.num_heads // size, num_groups=self.num_groups // size)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention, the same in every layer that has it. Fields are named as in `config.json`.

    `Architecture.kv_channels` are the channels of a head's values.

    Args:
        q_lora_rank: width of the latent of queries; None: queries are projected from the residual stream.
        kv_lora_rank: width of the latent of keys and values.
        qk_nope_head_dim: channels of a head's queries and keys that are not rotated.
        qk_rope_head_dim: channels that are rotated. Those of the key are the same in all heads.
        rope_interleave: channels 2i and 2i + 1 turn together; else i and i + qk_rope_head_dim / 2.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    rope_interleave: bool

    @property
    def qk_head_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta nets, the same in every layer that has one. Fields are named as in `config.json` and in Megatron.

    Args:
        linear_num_key_heads: number of heads of queries and keys.
        linear_key_head_dim: channels of such a head.
        linear_num_value_heads: number of heads of values, decays and gates, a multiple of the key heads.
        linear_value_head_dim: channels of such a head.
        linear_conv_kernel_dim: tokens that the causal convolution sees, the present one included.
    """

    linear_num_key_heads: int
    linear_key_head_dim: int
    linear_num_value_heads: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    @property
    def key_channels(self) -> int:
        """Channels of all keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_channels(self) -> int:
        """Channels of all values."""
        return self.linear_num_value_heads * self.linear_value_head_dim


@dataclass(frozen=True)
class Multipliers:
    """Constants that a model multiplies by, and the caps of its logits and of attention's scores.

    Args:
        embedding: factor of the embeddings.
        rounds_embedding: `embedding` is first rounded to the dtype of the weights.
        residual: factor of what attention and MLP add to the residual stream.
        logits: factor of the logits, applied before the softcap.
        softcap: c in `c * tanh(logits / c)`; None: logits are not capped.
        attention_softcap: the same for attention's scores, before the softmax.
    """

    embedding: float = 1.0
    rounds_embedding: bool = False
    residual: float = 1.0
    logits: float = 1.0
    softcap: float | None = None
    attention_softcap: float | None = None


Activation = Literal["silu", "gelu_pytorch_tanh", "relu2", "clamped_quick_gelu"]  # of the MLPs, by transformers' names
QUERY_BLOCK = 256  # queries that share a mask, or have their capped scores in memory at a time
FUSED_ACTIVATIONS = ("silu",)  # on a GPU, one kernel also multiplies them with the up projection

EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_ffn_hidden_size", "norm_topk_prob")  # of `ModelConfig`


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Two are equal if they describe the same network, whatever their sources.

    Args:
        name: name in messages: the checkpoint as the config names it, or the config's class.
        source: checkpoint that was read; None for random weights.
        family: key of `families.FAMILIES`.
        vocab_size: number of tokens. The source may have more rows, and Megatron pads them (`padded_vocab_size`).
        rope_scaling: as in config.json, or None. If types of layers differ, it maps each type to its parameters.
        ropes: rotary embeddings resolved from `rotary_base` and `rope_scaling`.
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
        layers: sizes of each layer.
        block_configs: `layers` as the config states them; None if all layers are alike.
        experts: mixture of experts of the layers that have one; None for a dense model.
        mamba: sizes of Mamba mixers; None if no layer has one.
        latent: sizes of latent attention; None if no layer has it.
        delta_net: None for a model without gated delta nets.
        multipliers: constants for embeddings, residual branches and logits.
        family_fields: all fields of config.json that only this family has (`Family.own_fields`).
        init_std: standard deviation of random weights.
        quantization: numbers that it computes with; None: those of its dtype.
        documents_apart: in training and evaluation, attention and positions stay inside a document.
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
    ropes: tuple[Rope, ...]
    norm_epsilon: float
    tie_word_embeddings: bool
    qkv_bias: bool
    linear_bias: bool
    qk_norm: bool
    wide_qk_norm: bool
    attention_sinks: bool
    pre_norms: bool
    post_norms: bool
    output_gate: bool
    activation: Activation
    gated: bool
    layers: tuple[Layer, ...]
    block_configs: list[dict[str, Any]] | None
    experts: Experts | None
    mamba: Mamba | None
    latent: Latent | None
    delta_net: DeltaNet | None
    multipliers: Multipliers
    family_fields: dict[str, Any]
    init_std: float
    quantization: QuantizationConfig | None = field(default=None, compare=False)
    documents_apart: bool = field(default=False, compare=False)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def ffn_per_token(self, layer: Layer) -> int:
        """Return the width of all MLPs that process a token in a layer, side by side."""
        if not layer.has_experts or self.experts is None:
            return layer.ffn_hidden_size or 0
        experts = self.experts
        return experts.num_experts_per_tok * experts.moe_ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)

    @property
    def needs_own_attention(self) -> bool:
        """True if core attention is ours on a GPU, too.

        Transformer Engine caps no scores. Its sinks, and its attention inside documents, are untested.
        """
        return self.documents_apart or self.attention_sinks or self.multipliers.attention_softcap is not None

    @property
    def rotary_channels(self) -> int:
        """Channels of a head's queries and keys that rotary embeddings are made for."""
        return self.latent.qk_rope_head_dim if self.latent else self.kv_channels

    @property
    def longest_sequence(self) -> int:
        """Length in tokens up to which rotary frequencies do not depend on the length of a sequence.

        For a sequence beyond longrope's original length, transformers uses `long_factor` at all positions.
        """
        originals = [rope.original_max_position_embeddings for rope in self.ropes if rope.rope_type == "longrope"]
        return min([self.max_position_embeddings, *(length for length in originals if length is not None)])

    @property
    def as_stored(self) -> "Architecture":
        """The same model with all rows of its source. `vocab_size` may leave out the last ones."""
        if self.source is None or self.source.vocab_size is None:
            return self
        return replace(self, vocab_size=self.source.vocab_size)

    def at_length(self, length: int) -> "Architecture":
        """Return the same model for sequences of `length` tokens. Windows that none of them reaches are dropped.

        Comparisons with transformers reach windows of less than `COMPARED` tokens, however short the sequences.
        """
        idle = [layer.window is not None and layer.window >= max(length, COMPARED) for layer in self.layers]
        layers = [replace(layer, window=None) if i else layer for layer, i in zip(self.layers, idle, strict=True)]
        return replace(self, layers=tuple(layers))

    def with_documents_apart(self) -> "Architecture":
        """Return the same model with attention and positions that stay inside a document.

        Raises:
            ValueError: for a model with Mamba or gated delta net mixers, whose state would reach over the boundary.
        """
        for i, layer in enumerate(self.layers):
            if layer.mixer not in (None, "latent_attention"):
                raise ValueError(
                    f"{self.name} has a {layer.mixer} in layer {i}, whose state cannot be reset at a document: set "
                    "data.reset_at_documents=false, and prepare the text without pack"
                )
        return replace(self, documents_apart=True)

    def filled[T: ModelConfig](self, config: T) -> T:
        """Return a copy of the model's config with every unset field filled in, as a run records it."""
        values = vars(self) | {"num_layers": self.num_layers} | (asdict(self.experts) if self.experts else {})
        return replace(config, **{f.name: values[f.name] for f in fields(config) if f.name in values})


class Models(NamedTuple):
    """Architectures of a run."""

    student: Architecture
    teacher: Architecture | None


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of rows of Megatron's embedding and output layer."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

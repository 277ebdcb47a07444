"""Nemotron-H, Nemotron-Nano-9B-v2 and Nemotron-3-Nano: layers that are Mamba-2, attention, an MLP or experts alone.

Attention has no rotary embedding, MLPs no gate. Tensors have NVIDIA's names, which transformers reads and vLLM needs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Architecture, Experts, Layer, Mamba
from distill_nemo.models.config_fields import MAX_HEADS, MAX_LAYERS, MAX_SIZE, Fields, shown
from distill_nemo.models.families.experts import SigmoidRouter, read_experts, sigmoid_experts, write_experts
from distill_nemo.models.families.family import Family
from distill_nemo.models.families.pieces import (
    EMBEDDING,
    EXPERT,
    EXPERT_BIAS,
    FINAL_NORM,
    OUTPUT,
    Place,
    Table,
    column_parallel,
    expert_ffn,
    experts,
    ffn,
    heads,
    hidden,
    one,
    query_key_value,
    replicated,
    row_parallel,
    several_in_one,
    shared_ffn,
    vocabulary,
)

SYMBOLS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
# Names that override the usual ones where a config.json has both.
OTHER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
}


@dataclass(frozen=True)
class NemotronHFields(SigmoidRouter):
    """Kinds of layers, sizes of Mamba, and routing."""

    hybrid_override_pattern: str = setting("", "a letter for each layer: M Mamba, * attention, - MLP, E experts")
    mamba_num_heads: int = setting(128, at_least=1, at_most=MAX_HEADS)
    mamba_head_dim: int = setting(64, at_least=1, at_most=MAX_SIZE)
    n_groups: int = setting(8, "groups of Mamba's heads", at_least=1, at_most=MAX_HEADS)
    ssm_state_size: int = setting(128, at_least=1, at_most=MAX_SIZE)
    conv_kernel: int = setting(4, "tokens of Mamba's convolution", at_least=2, at_most=4)  # as causal_conv1d allows
    chunk_size: int = setting(128, at_least=1, at_most=MAX_SIZE)
    moe_shared_expert_intermediate_size: int = setting(7688, "of the MLP for all tokens", at_least=1, at_most=MAX_SIZE)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Refuse a pattern that does not say what each layer is."""
        pattern, count = self.hybrid_override_pattern, values["num_layers"]
        require(
            len(pattern) == count,
            f"hybrid_override_pattern has {len(pattern)} letters, num_layers = {count}",
        )
        unknown = sorted(set(pattern) - set(SYMBOLS.values()))
        require(
            not unknown,
            "hybrid_override_pattern must hold M (Mamba), * (attention), - (MLP) and E (experts) only, got "
            f"{shown(unknown)}",
        )
        require(
            ("E" in pattern) == (values["num_experts"] is not None),
            f"hybrid_override_pattern has {pattern.count('E')} layers E, num_experts = {values['num_experts']}",
        )
        require(
            self.mamba_num_heads % self.n_groups == 0,
            f"mamba_num_heads = {self.mamba_num_heads} is not divisible by n_groups = {self.n_groups}",
        )
        require(values["block_configs"] is None, "block_configs: hybrid_override_pattern says what each layer is")
        return super().resolved(values) if "E" in pattern else self


def _spelled(config: Fields) -> dict[str, Any]:
    """Return the pattern, which transformers 5 writes as a list of words, and the names that all families have."""
    kinds, pattern = config.values.get("layers_block_type"), config.values.get("hybrid_override_pattern")
    if kinds is None:
        kinds = config.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in SYMBOLS for kind in kinds):
            raise ValueError(
                f"{config.where}: layers_block_type must hold {', '.join(SYMBOLS)} only, got {shown(kinds)}"
            )
        pattern = "".join(SYMBOLS[kind] for kind in kinds)
    if not isinstance(pattern, str) or len(pattern) > MAX_LAYERS:
        raise Fields({"hybrid_override_pattern": pattern}, config.where).wrong(
            "hybrid_override_pattern", f"a letter for each of at most {MAX_LAYERS:,} layers"
        )
    other = {usual: config.values[name] for name, usual in OTHER_NAMES.items() if name in config.values}
    return {
        **other,
        "hybrid_override_pattern": pattern,
        "layer_types": None,
        "num_hidden_layers": len(pattern) or None,
        "rms_norm_eps": config.values.get("layer_norm_epsilon", 1e-5),
        "hidden_act": config.values.get("mlp_hidden_act", "relu2"),
    }


def _refused(config: Fields) -> dict[str, bool]:
    """Refuse what transformers or the kernel computes differently from the authors' code, or not at all."""
    limit = config.values.get("time_step_limit")
    return {
        "use_bias": config.flag("use_bias"),
        "mamba_proj_bias": config.flag("mamba_proj_bias"),
        "use_conv_bias = false": config.values.get("use_conv_bias", True) is not True,
        "residual_in_fp32": config.flag("residual_in_fp32"),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        f"mamba_hidden_act {shown(config.values.get('mamba_hidden_act'))}": config.text("mamba_hidden_act", "silu")
        not in ("silu", "swish"),
        f"time_step_limit {shown(limit)}": not _is_no_limit(limit),
        f"moe_latent_size {shown(config.values.get('moe_latent_size'))}": config.values.get("moe_latent_size")
        is not None,
        "num_nextn_predict_layers": config.values.get("num_nextn_predict_layers") not in (None, 0),
    }


def _is_no_limit(limit: Any) -> bool:
    """Return True for 0 to infinity, which transformers 5 writes as an object."""
    infinite = ({"__float__": "Infinity"}, math.inf)
    return limit is None or (isinstance(limit, list) and len(limit) == 2 and limit[0] == 0 and limit[1] in infinite)


def _layers(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    kinds = {
        "M": Layer(None, None, None, mixer="mamba"),
        "*": Layer(values["num_query_groups"], None, None),
        "-": Layer(None, values["ffn_hidden_size"], None),
        "E": Layer(None, values["moe_ffn_hidden_size"], None, has_experts=True),
    }
    return tuple(kinds[letter] for letter in values["family_fields"]["hybrid_override_pattern"])


def _mamba(values: dict[str, Any]) -> Mamba:
    own = values["family_fields"]
    return Mamba(
        num_heads=own["mamba_num_heads"],
        head_dim=own["mamba_head_dim"],
        num_groups=own["n_groups"],
        state_size=own["ssm_state_size"],
        conv_kernel=own["conv_kernel"],
        chunk_size=own["chunk_size"],
    )


def _experts(values: dict[str, Any]) -> Experts:
    shared = values["family_fields"]["moe_shared_expert_intermediate_size"]
    return replace(sigmoid_experts(values), shared_ffn_hidden_size=shared)


def _read_experts(config: Fields) -> dict[str, Any]:
    return read_experts(config, "n_routed_experts") if "E" in config.text("hybrid_override_pattern") else {}


def _write(model: Architecture) -> dict[str, Any]:
    return {
        **(write_experts(model, "n_routed_experts") if model.experts else {}),
        "layer_norm_epsilon": model.norm_epsilon,
        "mlp_hidden_act": model.activation,
        "pad_token_id": None,  # else 0, whatever the tokenizer
    }


def _sizes(place: Place) -> Mamba:
    assert place.model.mamba is not None
    return place.model.mamba


def mamba_heads(place: Place) -> int:
    """Return the number of Mamba's heads."""
    return _sizes(place).num_heads


def mamba_channels(place: Place) -> int:
    """Return the channels of all its heads."""
    return _sizes(place).channels


def mamba_states(place: Place) -> int:
    """Return the numbers that a channel keeps, of all groups."""
    return _sizes(place).num_groups * _sizes(place).state_size


def mamba_kernel(place: Place) -> int:
    """Return the tokens of its convolution."""
    return _sizes(place).conv_kernel


LAYER = "backbone.layers.{i}."
MIXER = LAYER + "mixer."
NORM = replicated(LAYER + "norm.weight", hidden)
SELF = "self_attention."
CONVOLVED = (mamba_channels, mamba_states, mamba_states)
MAMBA: Table = {
    "input_layernorm.weight": NORM,
    SELF + "in_proj.weight": several_in_one(
        MIXER + "in_proj.weight", (mamba_channels, *CONVOLVED, mamba_heads), hidden
    ),
    SELF + "conv1d.weight": several_in_one(MIXER + "conv1d.weight", CONVOLVED, one, mamba_kernel),
    SELF + "conv1d.bias": several_in_one(MIXER + "conv1d.bias", CONVOLVED),
    **{SELF + name: column_parallel(MIXER + name, mamba_heads) for name in ("A_log", "D", "dt_bias")},
    SELF + "norm.weight": column_parallel(MIXER + "norm.weight", mamba_channels),
    SELF + "out_proj.weight": row_parallel(MIXER + "out_proj.weight", hidden, mamba_channels),
}
ATTENTION: Table = {
    "input_layernorm.weight": NORM,
    SELF + "linear_qkv.weight": query_key_value(
        MIXER + "q_proj.weight", MIXER + "k_proj.weight", MIXER + "v_proj.weight", hidden
    ),
    SELF + "linear_proj.weight": row_parallel(MIXER + "o_proj.weight", hidden, heads),
}
MLP: Table = {
    "pre_mlp_layernorm.weight": NORM,
    "mlp.linear_fc1.weight": column_parallel(MIXER + "up_proj.weight", ffn, hidden),
    "mlp.linear_fc2.weight": row_parallel(MIXER + "down_proj.weight", hidden, ffn),
}
EXPERTS: Table = {
    "pre_mlp_layernorm.weight": NORM,
    "mlp.router.weight": replicated(MIXER + "gate.weight", experts, hidden),
    EXPERT_BIAS: replicated(MIXER + "gate.e_score_correction_bias", experts),
    EXPERT + "linear_fc1.weight": column_parallel(MIXER + "experts.{e}.up_proj.weight", expert_ffn, hidden),
    EXPERT + "linear_fc2.weight": row_parallel(MIXER + "experts.{e}.down_proj.weight", hidden, expert_ffn),
    "mlp.shared_experts.linear_fc1.weight": column_parallel(
        MIXER + "shared_experts.up_proj.weight", shared_ffn, hidden
    ),
    "mlp.shared_experts.linear_fc2.weight": row_parallel(MIXER + "shared_experts.down_proj.weight", hidden, shared_ffn),
}
AROUND: Table = {
    EMBEDDING: vocabulary("backbone.embeddings.weight"),
    FINAL_NORM: replicated("backbone.norm_f.weight", hidden),
    OUTPUT: vocabulary("lm_head.weight"),
}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    if layer.mixer == "mamba":
        return MAMBA
    if layer.has_experts:
        return EXPERTS
    return MLP if layer.num_query_groups is None else ATTENTION


NEMOTRON_H = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "norm_topk_prob": True,
    },
    activation="relu2",
    gated=False,
    rope_types={},
    spelled=_spelled,
    refused=_refused,
    own_fields=NemotronHFields,
    layers=_layers,
    mamba=_mamba,
    experts=_experts,
    may_be_dense=True,
    read_own=_read_experts,
    write_own=_write,
    layer_table=_layer_table,
    # transformers 5.14's own code mixes chunks wrongly, and raises steps to a minimum that the authors' kernels ignore.
    reference={"chunk_size": 128, "time_step_min": 1e-30},
    other_names={"backbone.embedding.weight": "backbone.embeddings.weight"},  # as transformers 5 writes it
    table_around=lambda model: AROUND,
)

"""Nemotron-H and Nemotron-Nano-9B-v2: layers that are a Mamba-2 mixer, or attention, or an MLP alone.

Attention has no rotary embedding, MLPs no gate. Tensors have NVIDIA's names, which transformers reads and vLLM needs.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Architecture, Layer, Mamba
from distill_nemo.models.config_fields import MAX_HEADS, MAX_LAYERS, MAX_SIZE, Fields, shown
from distill_nemo.models.families.family import Family, OwnFields
from distill_nemo.models.families.pieces import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Place,
    Table,
    column_parallel,
    ffn,
    heads,
    hidden,
    one,
    query_key_value,
    replicated,
    row_parallel,
    several_in_one,
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
class NemotronHFields(OwnFields):
    """Kinds of layers, and sizes of Mamba."""

    hybrid_override_pattern: str = setting("", "a letter for each layer: M Mamba, * attention, - MLP")
    mamba_num_heads: int = setting(128, at_least=1, at_most=MAX_HEADS)
    mamba_head_dim: int = setting(64, at_least=1, at_most=MAX_SIZE)
    n_groups: int = setting(8, "groups of Mamba's heads", at_least=1, at_most=MAX_HEADS)
    ssm_state_size: int = setting(128, at_least=1, at_most=MAX_SIZE)
    conv_kernel: int = setting(4, "tokens of Mamba's convolution", at_least=2, at_most=4)  # as causal_conv1d allows
    chunk_size: int = setting(128, at_least=1, at_most=MAX_SIZE)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Refuse a pattern that does not say what each layer is."""
        pattern, count = self.hybrid_override_pattern, values["num_layers"]
        require(
            len(pattern) == count,
            f"hybrid_override_pattern has {len(pattern)} letters, num_layers = {count}",
        )
        unknown = sorted(set(pattern) - set("M*-"))
        require(
            not unknown,
            f"hybrid_override_pattern must hold M (Mamba), * (attention) and - (MLP) only, got {shown(unknown)}",
        )
        require(
            self.mamba_num_heads % self.n_groups == 0,
            f"mamba_num_heads = {self.mamba_num_heads} is not divisible by n_groups = {self.n_groups}",
        )
        require(values["block_configs"] is None, "block_configs: hybrid_override_pattern says what each layer is")
        return self


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


def _write(model: Architecture) -> dict[str, Any]:
    return {
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
AROUND: Table = {
    EMBEDDING: vocabulary("backbone.embeddings.weight"),
    FINAL_NORM: replicated("backbone.norm_f.weight", hidden),
    OUTPUT: vocabulary("lm_head.weight"),
}


def _layer_table(model: Architecture, layer: Layer) -> Table:
    if layer.mixer == "mamba":
        return MAMBA
    return MLP if layer.num_query_groups is None else ATTENTION


NEMOTRON_H = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    defaults={"max_position_embeddings": 4096, "num_key_value_heads": 8, "head_dim": 128},
    activation="relu2",
    gated=False,
    rope_types={},
    spelled=_spelled,
    refused=_refused,
    own_fields=NemotronHFields,
    layers=_layers,
    mamba=_mamba,
    write_own=_write,
    layer_table=_layer_table,
    # transformers 5.14's own code mixes chunks wrongly, and raises steps to a minimum that the authors' kernels ignore.
    reference={"chunk_size": 128, "time_step_min": 1e-30},
    table_around=lambda model: AROUND,
)

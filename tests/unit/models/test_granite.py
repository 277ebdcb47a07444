"""Granite: constants within limits, and what Granite 4 has beside attention."""

import pytest

from tests.tiny_models import OWN_FIELDS
from tests.unit.models.config_json import resolve_json

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 507,
}
HYBRID = OWN_FIELDS["granitemoehybrid"] | {"layer_types": ["attention"] * 2}
FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def resolved(path, model_type, **own):
    return resolve_json(path, {"model_type": model_type, **SIZES, **own})


@pytest.mark.parametrize("model_type", ["granite", "granitemoe"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("value", [1e30, 1e-310, 0, -1.0])
def test_constants_beyond_the_range_of_a_dtype_are_refused(tmp_path, model_type, factor, value):
    with pytest.raises(ValueError, match=f"config.json: {factor} must be at least 1e-06 and at most 1000000.0, got"):
        resolved(tmp_path, model_type, **{factor: value})


def test_the_width_of_granite_4s_mlp_is_that_of_its_shared_expert(tmp_path):
    model = resolved(tmp_path, "granitemoehybrid", **HYBRID)
    assert model.ffn_hidden_size == model.layers[1].ffn_hidden_size == 80
    absent = {name: value for name, value in HYBRID.items() if name != "shared_intermediate_size"}
    assert resolved(tmp_path, "granitemoehybrid", **absent).ffn_hidden_size == 1024  # transformers' default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts 8 beside the shared one is not supported"),
        ({"num_local_experts": None}, "num_local_experts None beside the shared one is not supported"),
        ({"layer_types": ["mamba", "attention"]}, r"Mamba layers \(layer_types \['mamba', 'full_attention'\]\)"),
        ({"layer_types": ["attention", "linear_attention"]}, "Mamba layers"),
        ({"layer_types": None}, r"Mamba layers \(layer_types absent or null\)"),
        ({"layer_types": "attention"}, "layer_types 'attention'"),
        ({"position_embedding_type": "nope"}, "position_embedding_type 'nope' is not supported"),
        ({"position_embedding_type": None}, "position_embedding_type None is not supported"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size must be a positive integer"),
        ({"attention_bias": True}, "attention_bias is not supported"),
    ],
)
def test_granite_4_is_refused_with_what_is_not_computed(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        resolved(tmp_path, "granitemoehybrid", **HYBRID | change)

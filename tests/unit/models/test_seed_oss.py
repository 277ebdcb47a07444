"""Seed-OSS's fields: defaults, biases, dropout, and refusals."""

import json
from pathlib import Path

import pytest

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import write_hf

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture
def source(tmp_path):
    return Path(write_hf(tmp_path / "m", "seed_oss", layers=2))


def state(source, *absent, **change):
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))


def resolved(source):
    from distill_nemo.models.resolve import resolve

    return resolve(StudentConfig(str(source)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias = false is not supported"),
        ({"attention_bias": None}, "attention_bias = false is not supported"),
        ({"attention_bias": "yes"}, "attention_bias must be true, false or null, got 'yes'"),
        ({"attention_out_bias": True}, "attention_out_bias is not supported"),
        ({"attention_out_bias": 1}, "attention_out_bias must be true, false or null, got 1"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"partial_rotary_factor": 0.5}, 'must be 1 with family "seed_oss"'),
    ],
)
def test_what_is_not_computed_as_transformers_does_is_refused(source, change, message):
    state(source, **change)
    with pytest.raises(ValueError) as raised:
        resolved(source)
    assert message in str(raised.value) and str(source) in str(raised.value)


@pytest.mark.parametrize(
    ("head_dim", "channels"), [("absent", 128), (None, 16)], ids=["absent: 128", "null: hidden_size / heads"]
)
def test_head_dim_has_the_default_of_transformers(tmp_path, head_dim, channels):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {} if head_dim == "absent" else {"head_dim": head_dim}
    config = {"model_type": "seed_oss", "vocab_size": 507, "num_key_value_heads": 2, **sizes, **own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolved(tmp_path).kv_channels == AutoConfig.from_pretrained(tmp_path).head_dim == channels


@pytest.mark.parametrize(
    ("absent", "change"),
    [
        (("attention_bias", "attention_out_bias", "mlp_bias"), {}),
        ((), {"attention_dropout": 0.5, "residual_dropout": 0.5}),
        (("rope_parameters",), {"rope_theta": 1e7, "rope_scaling": LINEAR}),
    ],
    ids=["biases by default", "dropout", "rotary embedding"],
)
def test_logits_are_those_of_transformers(source, absent, change):
    state(source, *absent, **change)
    setup_device()
    from distill_nemo.models.source_check import check_source

    model = resolved(source)
    assert model.qkv_bias
    check_source(model)


def test_a_student_of_random_weights_opens_in_transformers_with_the_same_fields(tmp_path):
    import torch
    from transformers import AutoConfig

    setup_device()
    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
    written = to_huggingface(resolve(StudentConfig(family="seed_oss", **sizes)), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.attention_bias, theirs.attention_out_bias, theirs.mlp_bias) == (True, False, False)
    assert (theirs.head_dim, theirs.pad_token_id, theirs.bos_token_id) == (16, None, None)

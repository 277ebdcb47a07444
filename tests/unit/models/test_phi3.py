"""Spellings of Phi-3's rotary embeddings, and refusals."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import OWN_FIELDS, write_hf

SCALING = OWN_FIELDS["phi3"]["rope_scaling"]
FACTORS = {name: SCALING[name] for name in ("short_factor", "long_factor")}
PLAIN = {"rope_scaling": None, "rope_parameters": None, "rope_theta": 1e4}


@pytest.fixture
def source(tmp_path):
    return Path(write_hf(tmp_path / "m", "phi3", layers=1))


def resolved(source, **change):
    setup_device()
    from distill_nemo.models.resolve import resolve

    config = json.loads((source / "config.json").read_text()) | PLAIN | {"rope_scaling": SCALING} | change
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return resolve(StudentConfig(str(source)))


SPELLINGS = {
    "transformers 4": {},
    "transformers 5": {
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", **FACTORS},
    },
    "within the dictionary": {
        "rope_scaling": {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, **SCALING},
        "partial_rotary_factor": "absent",
    },
    "no scaling": {"rope_scaling": None},
    "no original length": {"original_max_position_embeddings": "absent", "max_position_embeddings": 8192},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_and_factor_are_those_of_transformers_and_are_exported(source, spelling):
    setup_device()
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.layers.rotary import frequencies

    def theirs():
        rotary = Phi3RotaryEmbedding(transformers.AutoConfig.from_pretrained(source))
        return rotary.inv_freq, rotary.attention_scaling

    def check(found, factor):
        assert torch.equal(found, theirs()[0]) and factor == theirs()[1] and len(found) == 6

    model = resolved(source, **SPELLINGS[spelling])
    found = frequencies(model.ropes[0], model.kv_channels, model.max_position_embeddings)
    if int(transformers.__version__.split(".")[0]) >= 5 or spelling == "transformers 4":
        check(*found)
    exported = to_huggingface(model, torch.float32)
    (source / "config.json").write_text(json.dumps(exported))
    check(*found)
    assert (
        resolved(source, **{name: exported.get(name, "absent") for name in ("rope_scaling", "rope_parameters")})
        == model
    )


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope_are_read(source, name):
    assert resolved(source, rope_scaling=SCALING | {"type": name}) == resolved(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": SCALING | {"type": "linear", "factor": 2.0}}, '"linear" is not supported'),
        ({"partial_rotary_factor": 1.0}, "rope_scaling.short_factor must hold 8 numbers, got 6"),
        ({"sliding_window": "128"}, "sliding_window must be int | None, got '128'"),
        ({"partial_rotary_factor": 0.7, **PLAIN}, "kv_channels = 16 x partial_rotary_factor = 0.7 = 11 is not"),
        ({"partial_rotary_factor": 0.1, **PLAIN}, "kv_channels = 16 x partial_rotary_factor = 0.1 = 1 is not even"),
        ({"partial_rotary_factor": 1.25}, "partial_rotary_factor = 1.25 is not supported; it must be at most 1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}}, "long_factor must be a list of positive"),
        ({"rope_scaling": {"original_max_position_embeddings": 32, **SCALING}}, "contradicts 64 beside it"),
    ],
)
def test_what_is_not_computed_as_transformers_does_is_refused(source, change, message):
    with pytest.raises(ValueError) as raised:
        resolved(source, **change)
    assert message in str(raised.value) and str(source) in str(raised.value)


@pytest.mark.parametrize("window", [None, 5, 128])
def test_a_window_is_that_of_transformers(source, window):
    from distill_nemo.models.source_check import check_source

    model = resolved(source, sliding_window=window)
    assert [layer.window for layer in model.layers] == [window]
    check_source(model)

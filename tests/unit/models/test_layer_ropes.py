"""Rotary embeddings of each type of layer, tested on a family that exists only here."""

import dataclasses
import json

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.unit.models import config_json

CONFIG = {
    "model_type": "striped",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 507,
    "max_position_embeddings": 256,
}
SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}, "full_attention": YARN}


@pytest.fixture(autouse=True)
def striped(monkeypatch):
    setup_device()
    from distill_nemo.models.families import FAMILIES
    from distill_nemo.models.families.family import Family

    def layers(values, same):
        return tuple(dataclasses.replace(layer, rope=i % 2) for i, layer in enumerate(same))

    kinds = ("sliding_attention", "full_attention")
    defaults = {"max_position_embeddings": 256, "rope_theta": 5e5}
    family = Family("striped", "LlamaForCausalLM", defaults, layer_ropes=kinds, partial_rotary=1.0, layers=layers)
    monkeypatch.setitem(FAMILIES, "striped", family)


def resolve_json(path, **change):
    return config_json.resolve_json(path, CONFIG | change)


def test_each_type_of_layer_has_its_own_in_the_familys_order(tmp_path):
    from distill_nemo.models.architecture import Rope

    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    expected = Rope(2e4), Rope(5e5, "yarn", **yarn)
    turned = dict(reversed(NESTED.items()))
    for change in ({"rope_parameters": NESTED}, {"rope_parameters": turned}, {"rope_scaling": NESTED}):
        assert resolve_json(tmp_path, **change).ropes == expected
    partial = resolve_json(tmp_path, rope_parameters=NESTED, rope_theta=1e6, partial_rotary_factor=0.5)
    assert partial.ropes == (Rope(2e4, "default", 0.5), Rope(1e6, "yarn", 0.5, **yarn))
    without_length = NESTED | {"full_attention": {"rope_type": "yarn", "factor": 4.0}}
    yarn["original_max_position_embeddings"] = 256
    assert resolve_json(tmp_path, rope_parameters=without_length).ropes[1] == Rope(5e5, "yarn", **yarn)


def test_layers_that_share_one_have_it_twice(tmp_path):
    first, second = resolve_json(tmp_path, rope_scaling=YARN).ropes
    assert first == second and first.rope_type == "yarn"


def test_they_are_recorded_and_exported_as_they_were_read(tmp_path):
    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    read = resolve_json(tmp_path, rope_parameters=NESTED)
    exported = to_huggingface(read, torch.float32)
    assert exported["rope_scaling"] is None and exported["rope_parameters"]["full_attention"].items() >= YARN.items()
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert resolve(StudentConfig(str(tmp_path))) == read
    assert resolve(StudentConfig(family="striped", **SHAPE, rope_scaling=read.rope_scaling)).ropes == read.ropes
    (tmp_path / "architecture.json").write_text(json.dumps(dataclasses.asdict(read.filled(StudentConfig()))))
    assert resolve(StudentConfig(str(tmp_path))) == read


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ({"full_attention": YARN}, "must hold one object for sliding_attention and one for full_attention, got {'full"),
        (NESTED | {"factor": 2.0}, "must hold one object for sliding_attention and one for full_attention"),
        (NESTED | {"full_attention": 4}, "must hold one object for sliding_attention and one for full_attention"),
        (NESTED | {"full_attention": None}, "must hold one object for sliding_attention and one for full_attention"),
        (NESTED | {"full_attention": YARN | {"factor": "4"}}, "full_attention: factor must be a positive number"),
        (NESTED | {"full_attention": YARN | {"truncate": False}}, "full_attention.truncate = False is not supported"),
        (NESTED | {"full_attention": {"rope_type": "ntk"}}, 'full_attention: type "ntk" is not supported'),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, nested, message):
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, rope_parameters=nested)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)
    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(family="striped", **SHAPE, rope_scaling=nested))
    assert "rope_scaling" in str(raised.value)

"""Fields of `config.json` that only one family has, tested on a family that exists only here."""

import dataclasses
import json
from typing import Any, Literal, Self

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.fields import setting
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.family import Family, OwnFields
from tests.unit.models import config_json

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
CONFIG = {
    "model_type": "rainbow",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 507,
}
Colour = Literal["red", "green"]


@dataclasses.dataclass(frozen=True)
class Rainbow(OwnFields):
    scale: float = setting(1.0, above=0)
    width: int | None = setting(8, at_least=1)
    colours: list[Colour] | None = None

    def resolved(self, values: dict[str, Any]) -> Self:
        colours = self.colours or ["red"] * values["num_layers"]
        if len(colours) != values["num_layers"]:
            raise ValueError(f"colours has {len(colours)} entries, num_layers = {values['num_layers']}")
        return dataclasses.replace(self, colours=colours)


DEFAULTS = {"scale": 1.0, "width": 8, "colours": ["red", "red"]}


@pytest.fixture(autouse=True)
def rainbow(monkeypatch):
    defaults = {"max_position_embeddings": 2048}
    family = Family("rainbow", "LlamaForCausalLM", defaults, own_fields=Rainbow)
    monkeypatch.setitem(FAMILIES, "rainbow", family)


def resolve_json(path, own, **stated):
    return config_json.resolve_json(path, CONFIG | own, **stated)


def random_student(**fields):
    from distill_nemo.models.resolve import resolve

    return resolve(StudentConfig(family="rainbow", **SHAPE, **fields))


@pytest.mark.parametrize(
    ("own", "change"),
    [
        ({}, {}),
        ({"scale": None, "colours": None}, {}),
        ({"width": None}, {"width": None}),
        ({"scale": 2, "colours": ["red", "green"]}, {"scale": 2.0, "colours": ["red", "green"]}),
    ],
)
def test_they_are_read_with_the_defaults_of_transformers_and_written_back(tmp_path, own, change):
    from distill_nemo.models.families.huggingface import to_huggingface

    resolved = resolve_json(tmp_path, own)
    assert resolved.family_fields == DEFAULTS | change
    stated = {name: value for name, value in own.items() if value is not None or name == "width"}
    assert random_student(family_fields=stated).family_fields == resolved.family_fields
    assert to_huggingface(resolved, torch.float32).items() >= resolved.family_fields.items()


BAD = [
    ({"scale": 0}, "scale must be above 0, got 0"),
    ({"scale": "wide"}, "scale must be float, got 'wide'"),
    ({"width": 1.5}, "width must be int | None, got 1.5"),
    ({"colours": ["blue", "red"]}, "colours must be list[Literal['red', 'green']] | None, got ['blue', 'red']"),
    ({"colours": ["red"]}, "colours has 1 entries, num_layers = 2"),
]


@pytest.mark.parametrize(("own", "message"), BAD)
def test_a_wrong_value_is_refused_by_name(tmp_path, own, message):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, own)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)
    with pytest.raises(ValueError) as raised:
        random_student(family_fields=own)
    assert message in str(raised.value)


def test_a_random_student_states_only_fields_that_its_family_has():
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError, match=r'unknown field "family_fields.wide". (Did you mean|Known)'):
        random_student(family_fields={"wide": 4})
    with pytest.raises(ValueError, match=r'family_fields.width: family "llama" has no fields of its own'):
        resolve(StudentConfig(**SHAPE, family_fields={"width": 4}))


def test_a_config_may_repeat_what_the_checkpoint_states_and_not_contradict_it(tmp_path):
    for stated in ({"width": 8}, {"colours": ["red", "red"]}, {}):
        assert resolve_json(tmp_path, {}, family_fields=stated).family_fields == DEFAULTS
    with pytest.raises(ValueError, match=r"family_fields = \{'width': 4\} contradicts .*'width': 8"):
        resolve_json(tmp_path, {}, family_fields={"width": 4})


def test_a_run_records_them_and_reads_them_back(tmp_path):
    from distill_nemo.models.resolve import resolve

    one, other = random_student(family_fields={"width": 4}), random_student()
    assert one != other
    recorded = dataclasses.asdict(one.filled(StudentConfig()))
    (tmp_path / "architecture.json").write_text(json.dumps(recorded))
    assert resolve(StudentConfig(checkpoint=str(tmp_path))) == one


def test_a_run_of_an_older_version_resumes(tmp_path):
    from distill_nemo.checkpoint.directory import check_resumable
    from distill_nemo.config import DataConfig, RunConfig
    from distill_nemo.config_files import to_dict

    student = StudentConfig(family_fields={"width": 4})
    run = RunConfig(output_dir="a", student=student, teacher=None, data=DataConfig(train=["a"]))
    now = to_dict(run) | {"contents": {}}
    saved = to_dict(run) | {"contents": {}}
    saved["student"] = {name: value for name, value in saved["student"].items() if name != "family_fields"}
    check_resumable(saved, now, resume=True)
    saved["student"]["family_fields"] = {"width": 8}
    with pytest.raises(ValueError, match=r"student\.family_fields: was {'width': 8}, is {'width': 4}"):
        check_resumable(saved, now, resume=True)


def test_a_list_longer_than_any_model_is_refused_unread(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: colours has 10,001 entries; at most 10,000 are read"):
        resolve_json(tmp_path, {"colours": [None] * 10_001})


def test_a_name_of_the_package_is_no_field_of_the_file(tmp_path):
    assert resolve_json(tmp_path, {"off_by_default": True}).family_fields == DEFAULTS

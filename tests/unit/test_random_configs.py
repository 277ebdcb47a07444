"""Random values in random fields of a run: a refusal names a field that was set."""

import random
import typing
from dataclasses import fields

import pytest

from distill_nemo.checks import check
from distill_nemo.config import StudentConfig
from distill_nemo.config_files import from_dict, sections, to_dict
from distill_nemo.fields import plain_type
from tests.unit.test_config import config

NUMBERS = {int: (-1, 0, 1, 2, 3, 4, 8, 31, 10**9), float: (-1.0, 0.0, 1e-30, 0.5, 1.0, 7.5, 1e30)}
TEXTS = {
    "hidden_layers": ([], ["decoder.layers.0:decoder.layers.0"], ["a"], ["a:b:c"]),
    "schedules": (
        {"temperature": "linear 0:4 2:1"},
        {"kd_loss_scale": "cosine 0:0 2:1"},
        {"lm_weight": "constant 0:0"},
    ),
    "train": ([], ["a"]),
}


def values_of(name, hint):
    """Return values of a field, most of them of its type."""
    plain = plain_type(hint)
    if name in TEXTS:
        return TEXTS[name]
    if typing.get_origin(plain) is typing.Literal:
        return (*typing.get_args(plain), "x")
    return NUMBERS.get(plain, (True, False) if plain is bool else ("", "x", 5))


FIELDS = [
    (section, each.name, values_of(each.name, typing.get_type_hints(kind)[each.name]))
    for section, kind in sections().items()
    for each in fields(kind)
]


@pytest.mark.parametrize("seed", range(4))
def test_a_refusal_names_a_field_that_was_set(seed):
    draw, refused = random.Random(seed), 0
    for _ in range(500):
        values, chosen = to_dict(config()), draw.sample(FIELDS, draw.choice((1, 2, 3)))
        values["student"] = to_dict(StudentConfig()) | values["student"]
        names = {"parallelism.*"} if any(section == "parallelism" for section, *_ in chosen) else set()
        for section, name, possible in chosen:
            values[section][name] = value = draw.choice(possible)
            names |= {name, *(value if isinstance(value, dict) else ())}
        try:
            check(from_dict(values), 8)
        except ValueError as error:
            refused += 1
            assert any(name in str(error) for name in names), (names, str(error))
    assert 100 < refused < 500

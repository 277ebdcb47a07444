"""SmolLM3's layers without a rotary embedding: their choice, and refusals."""

import json
from pathlib import Path

import pytest

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import write_hf

LAYER_TYPES = ["full_attention", "sliding_attention"] * 2


@pytest.fixture
def source(tmp_path):
    return Path(write_hf(tmp_path / "m", "smollm3"))


def resolved(source, **change):
    setup_device()
    from distill_nemo.models.resolve import resolve

    config = json.loads((source / "config.json").read_text())
    for name in ("no_rope_layers", "no_rope_layer_interval", "layer_types"):
        config.pop(name, None)
    (source / "config.json").write_text(json.dumps(config | change))
    return resolve(StudentConfig(str(source)))


@pytest.mark.parametrize(
    ("change", "rotary"),
    [
        ({}, [1, 1, 1, 0]),
        ({"no_rope_layer_interval": 3}, [1, 1, 0, 1]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 1}, [0, 0, 0, 0]),
        ({"no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 2}, [0, 1, 1, 0]),
        ({"no_rope_layers": [1, 1, 0, 1, 0, 0]}, [1, 1, 0, 1]),
    ],
)
def test_layers_rotate_where_transformers_says(source, change, rotary):
    import transformers

    model = resolved(source, **change)
    assert [int(layer.rope is not None) for layer in model.layers] == rotary
    assert transformers.AutoConfig.from_pretrained(source).no_rope_layers[:4] == rotary
    assert model == resolved(source, no_rope_layers=rotary), "one network, one spelling"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_rope_layers": [1, 1, 1]}, "no_rope_layers has 3 entries, num_layers = 4"),
        ({"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers must hold 0 (without) and 1"),
        ({"no_rope_layers": [1, True, 1, 0]}, "no_rope_layers must be list[int] | None"),
        ({"no_rope_layers": "1110"}, "no_rope_layers must be list[int] | None"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1, got 0"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "there is no sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, num_layers = 4"),
        ({"partial_rotary_factor": 0.5}, 'must be 1 with family "smollm3"'),
    ],
)
def test_what_is_not_computed_as_transformers_does_is_refused(source, change, message):
    with pytest.raises(ValueError) as raised:
        resolved(source, **change)
    assert message in str(raised.value) and str(source) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"sliding_window": 8}, [None] * 4),
        ({"use_sliding_window": True}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, [None, None, None, 8]),
        ({"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1, 1, 1]}, [8, None, None, None]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": LAYER_TYPES}, [None, 8, None, 8]),
    ],
)
def test_windows_are_those_of_transformers(source, change, windows):
    from distill_nemo.models.source_check import check_source

    model = resolved(source, **change)
    assert [layer.window for layer in model.layers] == windows
    check_source(model)

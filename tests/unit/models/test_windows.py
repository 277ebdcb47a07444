"""Sliding windows: read and computed as in transformers, and refused where they would not be exact."""

import dataclasses
import json

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import OWN_FIELDS, write_hf
from tests.unit.models import config_json

FULL, SLIDING = "full_attention", "sliding_attention"
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 507,
}
ON = {"use_sliding_window": True, "sliding_window": 7}


def resolve_json(path, model_type, **own):
    experts = OWN_FIELDS["qwen3_moe"] if "moe" in model_type else {}
    return config_json.resolve_json(path, {"model_type": model_type, **experts, **CONFIG, **own})


def windows_of(model):
    return [layer.window for layer in model.layers]


def windows_of_transformers(path):
    """Return the window of each layer according to transformers' config of the directory."""
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(path)
    types = getattr(theirs, "layer_types", None) or [SLIDING] * 4  # families without types have one window
    return [theirs.sliding_window if kind == SLIDING else None for kind in types]


READ = [
    ("mistral", {}, [4096] * 4),
    ("mistral", {"sliding_window": None}, [None] * 4),
    ("mistral", {"sliding_window": 7}, [7] * 4),
    ("ministral", {}, [4096] * 4),
    ("ministral", {"sliding_window": None}, [None] * 4),
    ("ministral", {"sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, FULL]}, [None, 7, 7, None]),
    ("qwen2", {}, [None] * 4),
    ("qwen2", {"sliding_window": 7, "max_window_layers": 2}, [None] * 4),
    ("qwen2", {**ON}, [None] * 4),  # max_window_layers is 28
    ("qwen2", {**ON, "max_window_layers": 1}, [None, 7, 7, 7]),
    ("qwen2", {**ON, "max_window_layers": 0}, [7] * 4),
    ("qwen2", {**ON, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
    ("qwen2", {**ON, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, [7, None, None, 7]),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 4096]),
    ("qwen3_moe", {}, [None] * 4),
    ("qwen3_moe", {"sliding_window": 7, "max_window_layers": 3}, [None] * 4),
    ("qwen3_moe", {**ON, "max_window_layers": 3}, [7] * 4),  # this family has no such field
]


@pytest.mark.parametrize(("family", "own", "windows"), READ)
def test_windows_are_those_that_transformers_reads(tmp_path, family, own, windows):
    from distill_nemo.models.families.huggingface import to_huggingface

    resolved = resolve_json(tmp_path, family, **own)
    assert windows_of(resolved) == windows_of_transformers(tmp_path) == windows
    written = to_huggingface(resolved, torch.float32)
    assert resolve_json(tmp_path, family, **{name: written[name] for name in resolved.family_fields}) == resolved
    assert windows_of_transformers(tmp_path) == windows


@pytest.mark.parametrize(
    "own",
    [
        {"sliding_window": 7, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None},
        {**ON, "layer_types": [FULL] * 4},
        {"layer_types": [FULL] * 4},
    ],
)
def test_every_spelling_of_no_window_is_the_same_network(tmp_path, own):
    assert resolve_json(tmp_path, "qwen2", **own) == resolve_json(tmp_path, "qwen2")


@pytest.mark.parametrize(
    ("family", "own", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be at least 1"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window must be int | None, got '4096'"),
        ("mistral", {"layer_types": [FULL] * 4}, 'set model_type "ministral"'),
        ("ministral", {"layer_types": [FULL]}, "layer_types has 1 entries, num_layers = 4"),
        ("ministral", {"layer_types": ["chunked_attention"] * 4}, "layer_types must be list[Literal["),
        ("ministral", {"layer_types": [SLIDING] * 4, "sliding_window": None}, "there is no sliding_window"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "layer_types has sliding_attention, but there is no sliding_window"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window must be bool, got 'yes'"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 4}, "sliding window attention (layer_types"),
    ],
)
def test_windows_that_transformers_would_not_compute_are_refused(tmp_path, family, own, message):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, family, **own)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3_moe_window"])
def test_a_family_that_may_have_windows_is_computed_with_them(tmp_path, family):
    setup_device()
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source

    model = resolve(StudentConfig(checkpoint=write_hf(tmp_path / "m", family, layers=2)))
    assert 5 in windows_of(model)
    check_source(model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"use_sliding_window": False, "layer_types": None}))
    with pytest.raises(ValueError, match="is read differently by transformers"):
        check_source(model)


def test_a_long_window_is_compared_by_a_short_one(tmp_path, monkeypatch):
    setup_device()
    from distill_nemo.models import source_check
    from distill_nemo.models.resolve import resolve

    monkeypatch.setattr(source_check, "WHOLE", 0)
    path = write_hf(tmp_path / "m", "ministral")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"sliding_window": 4096}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    model = resolve(StudentConfig(checkpoint=path))
    source_check.check_source(model)
    swapped = tuple(dataclasses.replace(layer, window=None if layer.window else 4096) for layer in model.layers)
    with pytest.raises(ValueError, match="is read differently by transformers"):
        source_check.check_source(dataclasses.replace(model, layers=swapped))


def test_a_window_as_long_as_the_sequence_is_none(tmp_path):
    from distill_nemo.models.families.huggingface import to_huggingface

    model = resolve_json(tmp_path, "ministral", sliding_window=64, layer_types=[FULL, SLIDING] * 2)
    assert windows_of(model.at_length(65)) == [None, 64, None, 64]
    assert windows_of(model.at_length(64)) == [None] * 4
    assert to_huggingface(model.at_length(64), torch.float32) == to_huggingface(model, torch.float32)


def test_a_window_that_only_the_comparison_reaches_is_no_other_reading(tmp_path):
    setup_device()
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source

    check_source(resolve(StudentConfig(checkpoint=write_hf(tmp_path / "m", "mistral"))).at_length(4))


def test_a_megatron_checkpoint_that_says_nothing_of_its_windows_is_not_taken_to_have_the_usual_ones(tmp_path):
    from distill_nemo.models.resolve import resolve

    (tmp_path / ".metadata").touch()
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
    shape |= {"checkpoint": str(tmp_path), "rotary_base": 1e4, "norm_epsilon": 1e-6}
    with pytest.raises(ValueError, match="does not say family_fields: set them beside checkpoint"):
        resolve(StudentConfig(family="mistral", **shape))
    assert windows_of(resolve(StudentConfig(family="mistral", family_fields={"sliding_window": 7}, **shape))) == [7] * 4
    assert windows_of(resolve(StudentConfig(family="qwen2", **shape))) == [None] * 4


def test_transformer_engine_with_windows_under_context_parallelism_is_refused(tmp_path, monkeypatch):
    setup_device()
    from distill_nemo.models import megatron

    model, two = resolve_json(tmp_path, "mistral", sliding_window=64), ParallelismConfig(context_parallel_size=2)
    config = megatron.transformer_config(model, two, torch.float32)
    assert (config.window_size, config.window_attn_skip_freq) == ((63, 0), [1] * 4)
    monkeypatch.setattr(megatron, "uses_transformer_engine", lambda model, dtype: True)
    with pytest.raises(
        ValueError, match=r"windows of 64 tokens .*context_parallel_size = 2.*sequence_length to at most"
    ):
        megatron.transformer_config(model, two, torch.float32)
    megatron.transformer_config(model, ParallelismConfig(), torch.float32)
    assert megatron.transformer_config(model.at_length(64), two, torch.float32).window_size is None

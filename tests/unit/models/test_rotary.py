"""Rotary embeddings: Megatron's own angles for the types that it has, transformers' logits for all others."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch

from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.tiny_models import LONGROPE, YARN_ROPE, write_hf

LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def alone():
    setup_device()
    with process_groups(ParallelismConfig()):
        yield


def angles(rope, channels, length=300):
    from distill_nemo.models.layers.rotary import Rotary, frequencies

    return Rotary([frequencies(rope, channels, 4096)[0]])(length)


@pytest.mark.parametrize(("base", "channels"), itertools.product((1e4, 5e5, 2e6, 123456.7), (2, 24, 64, 128)))
def test_default_and_llama3_angles_are_megatrons_bit_for_bit(base, channels):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from distill_nemo.models.architecture import Rope

    megatrons = functools.partial(RotaryEmbedding, channels, 1.0, rotary_base=base, use_cpu_initialization=True)
    assert torch.equal(angles(Rope(base), channels), megatrons()(300))
    for factor in (2.5, 8.0, 32.0):
        fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaled = angles(Rope(base, "llama3", factor=factor, **fields), channels)
        assert torch.equal(scaled, megatrons(rope_scaling=True, rope_scaling_factor=factor)(300))


def test_angles_are_those_of_each_length():
    from distill_nemo.models.layers.rotary import Rotary

    rotary = Rotary([torch.tensor([1.0, 0.5])])
    for length in (4, 7, 4):
        positions = torch.arange(float(length))
        expected = torch.stack([positions, positions / 2, positions, positions / 2], dim=1)
        assert torch.equal(rotary(length)[:, 0, 0], expected)


def built(architecture):
    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.seed import seed_everything

    seed_everything(0)
    return model_provider(student=architecture, parallelism=ParallelismConfig()).eval()


def tokens(length=LENGTH):
    return torch.randint(507, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model, length=LENGTH):
    return model(tokens(length), torch.arange(length).expand(2, -1), None)[..., :507]


def opened(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def theirs(path, length=LENGTH):
    return opened(path)(tokens(length)).logits


def error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN_ROPE,
    "yarn, mscale": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 4.0},
    "longrope": LONGROPE,
}  # fmt: skip


def scaled_llama(path, scaling):
    """Write a directory whose config.json states the scaling for transformers 4 and 5."""
    write_hf(path)
    config = json.loads((path / "config.json").read_text())
    config.pop("rope_parameters", None)
    beside = {name: scaling[name] for name in ("original_max_position_embeddings",) if name in scaling}
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4, "rope_scaling": scaling} | beside))
    return str(path)


@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    from distill_nemo.models.architecture import Rope
    from distill_nemo.models.resolve import resolve

    path = scaled_llama(tmp_path, SCALINGS[kind])
    architecture = resolve(StudentConfig(path))
    expected = theirs(path)
    assert error(logits_of(built(architecture)), expected) < 1e-5
    if kind != "dynamic":  # dynamic equals the default up to max_position_embeddings
        without = dataclasses.replace(architecture, ropes=(Rope(1e4),))
        assert error(logits_of(built(without)), expected) > 1e-3


def test_megatron_has_no_setting_for_the_factor_of_cosine_and_sine(tmp_path):
    """If this fails, `SelfAttention` reads the factor from a documented field, for `give_rotary_embeddings` to set."""
    from distill_nemo.models.layers import rotary
    from distill_nemo.models.resolve import resolve

    path = scaled_llama(tmp_path, YARN_ROPE)
    model = built(resolve(StudentConfig(path)))
    assert not any("attention_factor" in name or "concentration" in name for name in vars(model.config))
    assert error(logits_of(model), theirs(path)) < 1e-5
    for layer in model.decoder.layers:
        rotary._set_factor(layer.self_attention, 1.0)
    assert error(logits_of(model), theirs(path)) > 1e-3


def test_layers_may_have_rotary_embeddings_of_their_own_or_none(tmp_path):
    """Layers are plain, yarn on a part of the channels, without an embedding, and plain again."""
    from distill_nemo.models.architecture import Rope
    from distill_nemo.models.layers.rotary import frequencies
    from distill_nemo.models.resolve import resolve

    path = write_hf(tmp_path / "m")
    architecture = resolve(StudentConfig(path))
    partial = Rope(1e4, "yarn", 0.5, factor=4.0, original_max_position_embeddings=16)
    layers = tuple(
        dataclasses.replace(layer, rope=rope) for layer, rope in zip(architecture.layers, (0, 1, None, 0), strict=True)
    )
    architecture = dataclasses.replace(architecture, ropes=(*architecture.ropes, partial), layers=layers)
    plain, yarn = (frequencies(rope, 16, 128) for rope in architecture.ropes)
    expected = theirs_by_layer(path, [plain, yarn, None, plain])
    assert error(logits_of(built(architecture)), expected) < 1e-5


@torch.no_grad()
def theirs_by_layer(path, ropes):
    """Return logits of transformers' Llama whose layers rotate by (frequencies, factor) of their own."""
    from transformers.models.llama import modeling_llama
    from transformers.models.phi3 import modeling_phi3

    model = opened(path)
    for layer, rope in zip(model.model.layers, ropes, strict=True):
        found, factor = rope or (torch.zeros(8), 1.0)
        half = torch.outer(torch.arange(float(LENGTH)), found)
        whole = torch.cat([half, half], dim=-1)[None]
        own = {"position_embeddings": (whole.cos() * factor, whole.sin() * factor)}
        layer.register_forward_pre_hook(lambda _, args, kwargs, own=own: (args, kwargs | own), with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:  # Phi-3's leaves channels beyond the angles' unchanged
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_phi3.apply_rotary_pos_emb)
        return model(tokens()).logits


def test_sequences_beyond_longropes_original_length_are_refused(tmp_path):
    from distill_nemo.models.resolve import resolve
    from distill_nemo.training.entry import resolve_models

    path = scaled_llama(tmp_path, LONGROPE)
    model = built(resolve(StudentConfig(path)))
    assert error(logits_of(model, 64), theirs(path, 64)) < 1e-5
    assert error(logits_of(model, 65), theirs(path, 65)) > 1e-3, "transformers takes long_factor"
    run = RunConfig("nowhere", StudentConfig(write_hf(tmp_path / "student")), TeacherConfig(path))
    run.data.sequence_length = 64
    resolve_models(run)
    run.data.sequence_length = 65
    with pytest.raises(ValueError, match="65 is longer than the teacher's original_max_position_embeddings = 64: "):
        resolve_models(run)

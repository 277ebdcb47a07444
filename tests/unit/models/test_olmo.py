"""OLMo 2 and 3: norms over all heads, resharded checkpoints, windows and rotary embeddings by layer."""

import copy
import dataclasses
import json

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import write_hf
from tests.unit.models.built_weights import built_weights

TP2 = ParallelismConfig(tensor_model_parallel_size=2)


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    return StudentConfig(checkpoint=write_hf(tmp_path_factory.mktemp("olmo2") / "m", "olmo2", layers=2))


def test_a_checkpoint_of_two_ranks_is_read_by_one(one, two, olmo2, tmp_path):
    from distill_nemo.models.resolve import resolve

    whole = one.run(built_weights, olmo2, ParallelismConfig())[0]
    (tmp_path / "m").mkdir()
    parts = two.run(built_weights, olmo2, TP2, str(tmp_path / "m"))
    name = "decoder.layers.0.self_attention.k_layernorm.weight"
    assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    described = dataclasses.asdict(resolve(olmo2).filled(StudentConfig()))
    again = StudentConfig(**described | {"checkpoint": str(tmp_path / "m")})
    for found in (one.run(built_weights, again, ParallelismConfig())[0], whole):
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    for found, part in zip(two.run(built_weights, again, TP2), parts, strict=True):
        assert all(torch.equal(found[name], part[name]) for name in part)


def test_query_groups_that_ranks_would_share_are_refused(olmo2):
    setup_device()
    from distill_nemo.models.megatron import transformer_config
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError, match=r"num_query_groups of layer 0 = 2 is not divisible by .* = 4, as norms over"):
        transformer_config(resolve(olmo2), ParallelismConfig(tensor_model_parallel_size=4), torch.float32)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
ROPES = {
    "transformers 4": {"rope_theta": 5e5},
    "transformers 4, scaled": {"rope_theta": 5e5, "rope_scaling": YARN},
    "transformers 5": {"rope_parameters": {"full_attention": PLAIN | YARN, "sliding_attention": PLAIN}},
    "two bases": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN | {"rope_theta": 1e4}}},
    "scaled windows": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN | YARN}},
}


def olmo3(path, **own):
    from distill_nemo.models.resolve import resolve

    config = {"model_type": "olmo3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
    config |= {"num_attention_heads": 4, "vocab_size": 507, "max_position_embeddings": 512, **own}
    (path / "config.json").write_text(json.dumps(config))
    return resolve(StudentConfig(checkpoint=str(path)))


@pytest.mark.parametrize("spelling", ROPES)
def test_each_type_of_layer_has_its_window_and_its_rotary_embedding(tmp_path, spelling):
    setup_device()
    import transformers

    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.layers.rotary import frequencies

    model = olmo3(tmp_path, **copy.deepcopy(ROPES[spelling]))
    assert [layer.window for layer in model.layers] == [4096, 4096, 4096, None] * 2
    assert [layer.rope for layer in model.layers] == [1, 1, 1, 0] * 2
    for _ in range(2):  # as transformers wrote it, and as we write it
        if int(transformers.__version__.split(".")[0]) >= 5:
            from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

            theirs = Olmo3RotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
            for kind, rope in zip(("full_attention", "sliding_attention"), model.ropes, strict=True):
                ours, factor = frequencies(rope, 16, 512)
                assert torch.equal(ours, theirs.get_buffer(f"{kind}_inv_freq"))
                assert factor == vars(theirs)[f"{kind}_attention_scaling"]
        written = to_huggingface(model, torch.float32)
        assert olmo3(tmp_path, **written) == model
    assert written["rope_scaling"] == (YARN if "scaled" == spelling[-6:] or spelling == "transformers 5" else None)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta = 10000.0 is read differently by transformers 4 and 5"),
        ({}, "rope_theta must be a positive number, got None"),
        (
            {"rope_parameters": PLAIN},
            "rope_parameters must hold full_attention and sliding_attention, got ['rope_type'",
        ),
        ({"rope_theta": 5e5, "sliding_window": None}, "there is no sliding_window"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, '"dynamic" is not supported'),
    ],
)
def test_what_versions_of_transformers_read_differently_is_refused(tmp_path, own, message):
    with pytest.raises(ValueError) as raised:
        olmo3(tmp_path, **own)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)

"""Traps of Gemma's `config.json`. Its logits, gradients and exports are tested with those of all families."""

import json

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.models.architecture import Layer, Multipliers
from tests.unit.models.config_json import resolve_json

# Content of the hub's google/gemma-3-1b-it, as transformers 4.50 wrote it.
HUB = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
NESTED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


def read(path, **changes):
    return resolve_json(path, HUB | changes)


def test_a_directory_of_the_hub_is_read_as_transformers_reads_it(tmp_path):
    from transformers import AutoConfig

    from distill_nemo.models.checkpoints.pretrained import empty_model
    from distill_nemo.planning.parameters import total_parameters

    model = read(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert model.family_fields["layer_types"] == theirs.layer_types
    full = [number for number, layer in enumerate(model.layers) if layer.window is None]
    assert full == [5, 11, 17, 23]
    assert model.layers[4:6] == (Layer(1, 6912, rope=0, window=512), Layer(1, 6912, rope=1))
    assert [rope.rope_theta for rope in model.ropes] == [1e4, 1e6]
    assert model.multipliers == Multipliers(embedding=1152**0.5, rounds_embedding=True)
    assert model.tie_word_embeddings
    assert total_parameters(model) == sum(p.numel() for p in empty_model(theirs).parameters())


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": "absent", "rope_local_base_freq": "absent", "rope_parameters": NESTED},
        {"rope_theta": 1e6, "rope_parameters": NESTED | {"rope_theta": None, "rope_type": "default"}},
    ],
    ids=["transformers 4", "transformers 5", "both"],
)
def test_rotary_embeddings_of_both_versions_are_the_same(tmp_path, stated):
    sliding, full = read(tmp_path, **stated).ropes
    assert (sliding.stated, full.stated) == (NESTED["sliding_attention"], NESTED["full_attention"])


def test_a_model_of_either_version_is_the_same_after_an_export(tmp_path):
    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    models = [read(tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})]
    models.append(read(tmp_path, rope_theta="absent", rope_local_base_freq="absent", rope_parameters=NESTED))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(models[1], torch.float32)))
    models.append(resolve(StudentConfig(checkpoint=str(tmp_path))))
    assert models == [models[0]] * 3


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping (transformers ignores it) is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation silu is not supported"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping must be above 0"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_layers = 26"),
        ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar must be at least 1 and at most 16777216"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}},
            "rope_parameters must hold sliding_attention and full_attention, got ['rope_theta', 'rope_type', 'factor']",
        ),
        ({"rope_parameters": {"x" * 10**6: {}}}, "got ['xxxx"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, """rope_scaling with "type" = 'linear' alone"""),
    ],
)
def test_a_feature_that_would_be_computed_otherwise_is_refused_by_name(tmp_path, stated, message):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, **stated)
    assert message in str(raised.value) and len(str(raised.value)) < 1000


def test_a_random_student_is_written_as_transformers_reads_it(tmp_path):
    from transformers import AutoConfig

    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    own = {"sliding_window_pattern": 2, "final_logit_softcapping": 20.0}
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
    student = resolve(StudentConfig(family="gemma3_text", family_fields=own, rope_scaling=NESTED, **sizes))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(student, torch.float32)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == ["sliding_attention", "full_attention"] * 2
    assert {kind: theirs.rope_parameters[kind] for kind in NESTED} == NESTED
    assert theirs.final_logit_softcapping == 20.0 and theirs.query_pre_attn_scalar == 256
    again = resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert (again.layers, again.ropes, again.multipliers) == (student.layers, student.ropes, student.multipliers)

"""Traps of Gemma 2's `config.json`. Its logits, gradients and exports are tested with those of all families."""

import json

import pytest
import torch

from distill_nemo.config import StudentConfig
from tests.tiny_models import write_hf
from tests.unit.models.config_json import resolve_json

HUB = {  # of google/gemma-2-2b, as transformers 4.42 wrote it
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}


def read(path, **changes):
    return resolve_json(path, HUB | changes)


def test_a_directory_of_the_hub_is_read_as_transformers_reads_it(tmp_path):
    from transformers import AutoConfig

    model, theirs = read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert model.family_fields["layer_types"] == theirs.layer_types
    assert [layer.window for layer in model.layers[:4]] == [4096, None, 4096, None]
    assert (model.multipliers.attention_softcap, model.multipliers.softcap) == (50.0, 30.0)
    assert not model.qk_norm and model.post_norms and len(model.ropes) == 1


@pytest.mark.parametrize(
    ("name", "trait"), [("attn_logit_softcapping", "attention_softcap"), ("final_logit_softcapping", "softcap")]
)
def test_a_cap_that_is_null_is_none_and_one_that_is_absent_is_that_of_transformers(tmp_path, name, trait):
    assert getattr(read(tmp_path, **{name: None}).multipliers, trait) is None
    assert getattr(read(tmp_path, **{name: "absent"}).multipliers, trait) == HUB[name]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping must be above 0"),
        ({"attn_logit_softcapping": "x"}, "attn_logit_softcapping must be"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation gelu is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "parameters for one type of layer"),
    ],
)
def test_a_feature_that_would_be_computed_otherwise_is_refused_by_name(tmp_path, stated, message):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, **stated)
    assert message in str(raised.value) and len(str(raised.value)) < 1000


def test_transformers_computes_the_cap_of_scores_when_it_is_compared(tmp_path):
    """Before 5.24 its default is torch's fused attention, which overlooks the cap."""
    from transformers import AutoModelForCausalLM

    from distill_nemo.models.checkpoints.agreement import open_with_transformers

    path, tokens = write_hf(tmp_path / "m", "gemma2"), torch.arange(32)[None]
    try:
        fused = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError:
        pytest.skip("this version of transformers has no fused attention for Gemma 2")
    with torch.no_grad():
        ours = open_with_transformers(path, torch.float32)(tokens).logits
        assert (ours - fused(tokens).logits).norm() > 1e-2 * ours.norm()


def test_a_random_student_is_written_as_transformers_reads_it(tmp_path):
    from transformers import AutoConfig

    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    own = {"attn_logit_softcapping": 20.0, "sliding_window": 64}
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
    student = resolve(StudentConfig(family="gemma2", family_fields=own, **sizes))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(student, torch.float32)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.attn_logit_softcapping, theirs.final_logit_softcapping) == (20.0, 30.0)
    again = resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert (again.layers, again.ropes, again.multipliers) == (student.layers, student.ropes, student.multipliers)

"""Latent attention of DeepSeek-V3 and GLM-4.7-Flash: fields, refusals, layers left out, resharded checkpoints."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import YARN_ROPE, known, write_hf
from tests.unit.models.built_weights import built_weights

FAMILIES = tuple(filter(known, ("deepseek_v3", "glm4_moe_lite")))
TP2 = ParallelismConfig(tensor_model_parallel_size=2)
YARN = YARN_ROPE | {"factor": 40.0}
PLAIN = {"rope_scaling": None, "rope_parameters": None, "rope_theta": 1e4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: Path(write_hf(root / family, family, layers=2)) for family in FAMILIES}


def changed(models, family, path, **change):
    """Return a copy of a model with other fields in its config.json."""
    if family not in models:
        pytest.skip("this version of transformers lacks it")
    path.mkdir(exist_ok=True)
    config = json.loads((models[family] / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    if not (path / "model.safetensors").exists():
        (path / "model.safetensors").hardlink_to(models[family] / "model.safetensors")
    return path


def resolved(path):
    setup_device()
    from distill_nemo.models.resolve import resolve

    return resolve(StudentConfig(str(path)))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"rope_interleave": None}),
        ("deepseek_v3", {"model_type": "kimi_k2"}),
        ("glm4_moe_lite", {"rope_interleave": False}),
        ("deepseek_v3", {"rms_norm_eps": 0.1}),  # of the latents' norms it stays 1e-6
        ("glm4_moe_lite", {"rms_norm_eps": 0.1}),
        ("deepseek_v3", PLAIN),
        ("deepseek_v3", PLAIN | {"rope_scaling": YARN}),
        ("deepseek_v3", PLAIN | {"rope_scaling": YARN | {"mscale": 0.7}}),
        ("deepseek_v3", PLAIN | {"rope_scaling": YARN | {"mscale_all_dim": 0.7}}),
        ("deepseek_v3", PLAIN | {"rope_scaling": YARN | {"mscale_all_dim": 0.7, "attention_factor": 1.5}}),
        ("glm4_moe_lite", PLAIN | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
        ("glm4_moe_lite", PLAIN | {"rope_scaling": YARN | {"factor": 1.0, "mscale_all_dim": 0.5}}),
    ],
)
def test_logits_are_those_of_transformers(models, tmp_path, family, change):
    setup_device()
    from distill_nemo.models.source_check import check_source

    check_source(resolved(changed(models, family, tmp_path / "m", **change)))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_query_groups = 2 must be num_attention_heads = 4"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank must be at least 1"),
        ("deepseek_v3", {"kv_lora_rank": "20"}, "kv_lora_rank must be int, got '20'"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 must be even"),
        ("deepseek_v3", {"qk_nope_head_dim": 2**40}, "qk_nope_head_dim must be at least 1 and at most 16777216"),
        ("deepseek_v3", {"v_head_dim": None}, "v_head_dim must be a positive integer, got None"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ("deepseek_v3", PLAIN | {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'type "linear" is not supported'),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace = 2 leaves no layer with experts"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 2}, "mlp_layer_types leaves no layer with experts"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries, num_layers = 2"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "x"]}, "mlp_layer_types must be "),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace 2 (transformers ignores it)"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, 'must be 1 with family "glm4_moe_lite"'),
    ],
)
def test_what_is_not_computed_as_transformers_does_is_refused(models, tmp_path, family, change, message):
    path = changed(models, family, tmp_path / "m", **change)
    with pytest.raises(ValueError) as raised:
        resolved(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_layers_that_predict_further_tokens_are_left_out_if_the_config_states_them(models, tmp_path):
    from distill_nemo.models.checkpoints.export_files import export_files
    from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors

    path = changed(models, "deepseek_v3", tmp_path / "m", num_nextn_predict_layers=1)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    of_last = {name for name in tensors if name.startswith("model.layers.1.")}
    further = {name.replace(".1.", ".2.", 1): tensors[name].clone() for name in of_last}
    further["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors | further, path / "model.safetensors", {"format": "pt"})
    model = resolved(path)
    assert check_hf_tensors(path, model).keys() == tensors.keys()
    assert export_files(model, torch.float32, path, None).config["num_nextn_predict_layers"] == 0
    for count in (0, "1", None):
        with pytest.raises(ValueError, match="num_hidden_layers = 2, the safetensors hold 3 layers"):
            resolved(changed(models, "deepseek_v3", path, num_nextn_predict_layers=count))


def test_a_checkpoint_of_two_ranks_is_read_by_one(one, two, models, tmp_path):
    student = StudentConfig(str(models["deepseek_v3"]))
    whole = one.run(built_weights, student, ParallelismConfig())[0]
    (tmp_path / "m").mkdir()
    parts = two.run(built_weights, student, TP2, str(tmp_path / "m"))
    attention = "decoder.layers.0.self_attention."
    for name, split in (("linear_q_up_proj", True), ("linear_q_down_proj", False), ("linear_kv_down_proj", False)):
        found = [part[f"{attention}{name}.weight"] for part in parts]
        assert torch.equal(torch.cat(found) if split else found[1], whole[f"{attention}{name}.weight"])
    described = dataclasses.asdict(resolved(student.checkpoint).filled(StudentConfig()))
    again = StudentConfig(**described | {"checkpoint": str(tmp_path / "m")})
    (found,) = one.run(built_weights, again, ParallelismConfig())
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    for found, part in zip(two.run(built_weights, again, TP2), parts, strict=True):
        assert all(torch.equal(found[name], part[name]) for name in part)


RANDOM = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
RANDOM |= {"num_experts": 8, "num_experts_per_tok": 4, "moe_ffn_hidden_size": 48, "kv_channels": 24}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "first_k_dense_replace": 1, "n_group": 4}


def test_random_weights_are_the_same_at_every_tensor_parallel_size(one, two):
    own = LATENT | {"q_lora_rank": 24, "topk_group": 2}
    student = StudentConfig(family="deepseek_v3", **RANDOM, family_fields=own)
    whole = one.run(built_weights, student, ParallelismConfig())[0]
    for rank, part in enumerate(two.run(built_weights, student, TP2)):
        for name, mine in part.items():
            if ".self_attention." in name:
                same = whole[name] if mine.shape == whole[name].shape else None
                dim = next((d for d in range(mine.dim()) if mine.shape[d] != whole[name].shape[d]), 0)
                assert torch.equal(mine, whole[name].chunk(2, dim)[rank] if same is None else same), name


def test_context_parallelism_with_transformer_engine_is_refused(models, monkeypatch):
    setup_device()
    from distill_nemo.models import megatron

    model = resolved(models["deepseek_v3"])
    parallelism = ParallelismConfig(context_parallel_size=2)
    megatron.transformer_config(model, parallelism, torch.float32)
    monkeypatch.setattr(megatron, "uses_transformer_engine", lambda model, dtype: True)
    with pytest.raises(ValueError, match="latent attention is not supported with Transformer Engine under"):
        megatron.transformer_config(model, parallelism, torch.float32)

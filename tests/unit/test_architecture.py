"""Architectures read from `config.json` or `architecture.json`, and what is refused, by name."""

import dataclasses
import json

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig, TeacherConfig
from distill_nemo.runtime.device import setup_device

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 507,
}
SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", **SCALING}
SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def resolve_json(path, **change):
    from distill_nemo.models.architecture import resolve

    config = {name: value for name, value in (LLAMA | change).items() if value != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    return resolve(TeacherConfig(checkpoint=str(path)))


def test_defaults_without_a_checkpoint():
    from distill_nemo.models.architecture import resolve

    resolved = resolve(StudentConfig(**SHAPE))
    assert type(resolved) is StudentConfig
    assert (resolved.family, resolved.num_query_groups, resolved.kv_channels) == ("llama", 4, 16)
    assert (resolved.norm_epsilon, resolved.rotary_base, resolved.tie_word_embeddings) == (1e-5, 10000.0, False)
    with pytest.raises(ValueError, match="ffn_hidden_size, vocab_size: set them"):
        resolve(StudentConfig(num_layers=4, hidden_size=64, num_attention_heads=4))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["transformers 4", "transformers 5", "as exported"],
)
def test_rope_is_read_from_every_place_it_is_kept(tmp_path, rope):
    resolved = resolve_json(tmp_path, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True, **rope)
    assert type(resolved) is TeacherConfig
    assert (resolved.rotary_base, resolved.rope_scaling) == (5e5, LLAMA3)
    assert (resolved.num_query_groups, resolved.kv_channels, resolved.tie_word_embeddings) == (2, 24, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": "absent"}, "num_attention_heads must be a positive integer, got None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassification']"),
        ({"architectures": None}, "architectures [] is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"use_sliding_window": True}, "sliding window attention is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor = 2.0"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}}, "Megatron-Core knows 8192 only"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling.factor must be a number"),
    ],
)
def test_a_config_that_would_be_misread_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, **change)
    assert words in str(raised.value)


def test_our_own_description_is_read_back_and_checked(tmp_path):
    from distill_nemo.models.architecture import resolve

    resolved = resolve(StudentConfig(family="qwen3", rotary_base=1e6, **SHAPE))
    own = tmp_path / "architecture.json"
    own.write_text(json.dumps(dataclasses.asdict(resolved)))
    again = resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert again == dataclasses.replace(resolved, checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=r"rotary_base = 5\.0 contradicts"):
        resolve(StudentConfig(checkpoint=str(tmp_path), rotary_base=5.0))
    with pytest.raises(ValueError, match=r"rope_scaling = .* contradicts .* says None"):
        resolve(StudentConfig(checkpoint=str(tmp_path), rope_scaling=LLAMA3))
    own.write_text(json.dumps(dataclasses.asdict(resolved) | {"num_layer": 4}))
    with pytest.raises(ValueError, match=r'unknown field "num_layer".*num_layers'):
        resolve(StudentConfig(checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_layers", 0, "num_layers must be above 0, got 0"),
        ("num_attention_heads", 0, "num_attention_heads must be above 0"),
        ("rotary_base", -1.0, "rotary_base must be above 0, got -1.0"),
        ("init_std", float("nan"), "init_std must be above 0, got nan"),
        ("kv_channels", 7, "kv_channels = 7 is not even"),
        ("hidden_size", 3, "kv_channels = 0 is not even"),
    ],
)
def test_sizes_that_no_model_has_are_refused(field, value, words):
    from distill_nemo.models.architecture import resolve

    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(**SHAPE | {field: value}))
    assert f"StudentConfig: {words}" in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads = 4 is not divisible by parallelism.tensor"),
        ({"pipeline_model_parallel_size": 5}, "num_layers = 4 cannot fill"),
    ],
)
def test_a_layout_that_does_not_divide_a_loaded_architecture_is_refused(tmp_path, layout, words):
    setup_device()
    from distill_nemo.models.architecture import transformer_config

    with pytest.raises(ValueError, match=words):
        transformer_config(resolve_json(tmp_path), ParallelismConfig(**layout), torch.float32)


def test_megatron_config_by_family():
    setup_device()
    from distill_nemo.models.architecture import padded_vocab_size, resolve, transformer_config

    flags = {}
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        shape = SHAPE | (EXPERTS if family == "qwen3_moe" else {})
        config = transformer_config(resolve(StudentConfig(family=family, **shape)), ParallelismConfig(), torch.float32)
        assert config.calculate_per_token_loss and not config.add_bias_linear and config.gated_linear_unit
        flags[family] = (config.add_qkv_bias, config.qk_layernorm)
    qwen3 = (False, True)
    assert flags == {"llama": (False, False), "qwen2": (True, False), "qwen3": qwen3, "qwen3_moe": qwen3}
    assert [padded_vocab_size(size) for size in (1, 128, 507, 512, 513)] == [128, 128, 512, 512, 640]


@pytest.mark.parametrize(
    ("change", "normalised"),
    [({}, True), ({"num_experts": "absent", "num_local_experts": 4, "norm_topk_prob": "absent"}, False)],
    ids=["transformers 4", "transformers 5, by default"],
)
def test_experts_are_read_and_written(tmp_path, change, normalised):
    setup_device()
    from distill_nemo.models.architecture import transformer_config
    from distill_nemo.models.hf_config import from_huggingface, to_huggingface

    resolved = resolve_json(tmp_path, **(QWEN3_MOE | change))
    assert {name: getattr(resolved, name) for name in EXPERTS} == EXPERTS
    assert (resolved.ffn_hidden_size, resolved.norm_topk_prob) == (96, normalised)
    written = to_huggingface(resolved, torch.float32)
    again = from_huggingface(written, tmp_path)
    assert {name: value for name, value in vars(resolved).items() if name in again} == again
    config = transformer_config(resolved, ParallelismConfig(), torch.float32)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (4, 2, 48)
    assert config.moe_router_pre_softmax is not normalised
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": "absent"}, "num_experts must be a positive integer, got None"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive integer, got 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is above num_experts = 4"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob = True with num_experts_per_tok = 1"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported: every layer must have experts"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported: every layer must have experts"),
        ({"model_type": "qwen2_moe"}, "Did you mean qwen3_moe"),
    ],
)
def test_experts_that_are_not_supported_are_refused_by_name(tmp_path, change, words):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, **(QWEN3_MOE | change))
    assert words in str(raised.value)


def test_fields_of_experts_go_with_a_family_that_has_them():
    from distill_nemo.models.architecture import resolve

    random = resolve(StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS | {"ffn_hidden_size": None})))
    assert (random.ffn_hidden_size, random.norm_topk_prob) == (48, True)
    with pytest.raises(ValueError, match="the model needs num_experts_per_tok: set them"):
        resolve(StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS | {"num_experts_per_tok": None})))
    with pytest.raises(ValueError, match='num_experts = 4: family "qwen3" has no experts; qwen3_moe has'):
        resolve(StudentConfig(family="qwen3", num_experts=4, **SHAPE))
    blocks = [{"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 96}}] * 4
    with pytest.raises(ValueError, match="block_configs: layers that differ are not supported with experts"):
        resolve(StudentConfig(family="qwen3_moe", block_configs=blocks, **(SHAPE | EXPERTS)))


def test_a_layout_that_does_not_divide_experts_is_refused(tmp_path):
    setup_device()
    from distill_nemo.models.architecture import transformer_config

    layout = ParallelismConfig(expert_model_parallel_size=3)
    with pytest.raises(ValueError, match=r"num_experts = 4 is not divisible by parallelism\.expert"):
        transformer_config(resolve_json(tmp_path, **QWEN3_MOE), layout, torch.float32)


def test_a_dense_model_beside_one_with_experts_is_not_split_over_expert_parallel_ranks():
    setup_device()
    from distill_nemo.models.architecture import resolve, transformer_config

    parallelism = ParallelismConfig(expert_model_parallel_size=2)
    dense, sparse = StudentConfig(**SHAPE), StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS))
    sizes = [transformer_config(resolve(m), parallelism, torch.float32) for m in (dense, sparse)]
    assert [config.expert_model_parallel_size for config in sizes] == [1, 2]

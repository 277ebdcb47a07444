"""Traps of gpt-oss, and its MXFP4. Its logits, gradients and exports are tested with those of all families."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.tiny_models import write_hf
from tests.unit.models.config_json import resolve_json
from tests.unit.models.test_quantized_sources import mxfp4_oracle

HUB = {  # of openai/gpt-oss-20b, without layer_types, which are the default
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
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
    assert [layer.window for layer in model.layers[:3]] == [128, None, 128]
    assert (model.ropes[0].rope_theta, model.ropes[0].truncate) == (150000.0, False)
    assert model.attention_sinks and model.linear_bias and model.experts is not None
    assert total_parameters(model) == sum(p.numel() for p in empty_model(theirs).parameters()) == 20914757184


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"swiglu_limit": 6.0}, "swiglu_limit 6.0 is not supported"),
        ({"attention_bias": False}, "attention_bias false is not supported"),
        ({"rope_scaling": "absent"}, "a config without rope_scaling or rope_parameters (transformers' versions"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"num_local_experts": "absent"}, "num_local_experts must be a positive integer"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok = 33 is above num_experts = 32"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_layers = 24"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
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

    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 507, "kv_channels": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
    student = resolve(StudentConfig(family="gpt_oss", rope_scaling=rope, rotary_base=1e4, **sizes, **experts))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(student, torch.float32)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_local_experts, theirs.intermediate_size, theirs.sliding_window) == (8, 48, 128)
    again = resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert (again.layers, again.ropes, again.experts) == (student.layers, student.ropes, student.experts)


def write_mxfp4(path):
    """Write a tiny model with experts in MXFP4, and beside it the same, dequantised by the formula."""
    plain = write_hf(Path(f"{path}_plain"), "gpt_oss")
    path.mkdir()
    file, random = f"{plain}/model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    dequantised = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(120, 125, blocks.shape[:3], dtype=torch.uint8, generator=random)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dequantised[name] = torch.from_numpy(mxfp4_oracle(blocks.numpy(), scales.numpy())).contiguous()
    save_file(tensors, path / "model.safetensors")
    save_file(dequantised, file, {"format": "pt"})
    config = json.loads(Path(plain, "config.json").read_text())
    quantised = config | {"quantization_config": HUB["quantization_config"]}
    (path / "config.json").write_text(json.dumps(quantised))
    return str(path), plain


def test_a_directory_in_mxfp4_is_the_same_model_as_its_dequantised_copy(tmp_path):
    """It is exported plain, equal to the copy bit for bit, and compared with transformers at the start."""
    path, plain = write_mxfp4(tmp_path / "mxfp4")
    setup_device()
    from distill_nemo.models.checkpoints.huggingface import export_hf
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source

    student = resolve(StudentConfig(checkpoint=path))
    check_source(student)
    with process_groups(ParallelismConfig()):
        model = model_provider(student=student, parallelism=ParallelismConfig())
        export_hf([model], str(tmp_path / "out"), student, source=Path(path))
    written, expected = (load_file(f"{each}/model.safetensors") for each in (tmp_path / "out", plain))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def checkpoint_of(path):
    """Return keys of the sinks in a checkpoint, and the shape of the first."""
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.models.provider import model_provider

        model = model_provider(student=StudentConfig(checkpoint=path), parallelism=ParallelismConfig())
        state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
        found = [tensor for name, tensor in state.items() if name.endswith("softmax_offset")]
        return [tensor.key for tensor in found], found[0].global_shape


def test_sinks_are_part_of_a_checkpoint_under_megatrons_name(one, tmp_path):
    ((keys, shape),) = one.run(checkpoint_of, write_hf(tmp_path / "m", "gpt_oss"))
    assert set(keys) == {"decoder.layers.self_attention.core_attention.softmax_offset"} and shape[-1] == 4

"""Traps of gated delta nets, and of text models inside models of images and text."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.models.architecture import Layer
from tests.distillation_reference import delta_rule
from tests.distributed.checkpoint.test_resume import train
from tests.tiny_models import write_hf
from tests.training import metrics

SHAPE = {
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
WRAPPER = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}


def read(path, **config):
    from distill_nemo.models.resolve import resolve

    (path / "config.json").write_text(json.dumps(config))
    return resolve(StudentConfig(checkpoint=str(path)))


def wrap(path, **more):
    """Turn a directory of the text model into one of the whole model, as the hub has them."""
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(WRAPPER | {"text_config": text, "vision_config": {}} | more))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    others = {"mtp.fc.weight": torch.zeros(2, 2), "model.visual.patch_embed.proj.bias": torch.zeros(3)}
    save_file(tensors | others, path / "model.safetensors", {"format": "pt"})
    return path


def test_layers_alternate_as_transformers_reads_them(tmp_path):
    from transformers import AutoConfig

    from distill_nemo.models.checkpoints.pretrained import empty_model
    from distill_nemo.planning.parameters import total_parameters

    model = read(tmp_path, **SHAPE, full_attention_interval=3)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert model.family_fields["layer_types"] == theirs.layer_types
    net, attention = Layer(None, 96, rope=None, mixer="gated_delta_net"), Layer(2, 96)
    assert model.layers == (net, net, attention, net)
    assert (model.kv_channels, model.ropes[0].partial_rotary_factor) == (256, 0.25)
    assert total_parameters(model) == sum(p.numel() for p in empty_model(theirs).parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads = 3 is not divisible by linear_num_key_heads = 2"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_layers = 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"linear_num_key_heads": 10**9}, "linear_num_key_heads must be at least 1 and at most 4096"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be at least 1"),
        ({"linear_key_head_dim": "wide"}, "linear_key_head_dim"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"attn_output_gate": False}, "attn_output_gate False"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type sigmoid"),
    ],
)
def test_what_would_not_be_computed_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **SHAPE | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_config": None}, "text_config must be an object that describes the text model"),
        ({"text_config": {**SHAPE, "model_type": "llama"}}, 'model_type must be "qwen3_5_text"'),
        ({"text_config": 1}, "text_config must be an object"),
        ({"architectures": ["Qwen3_5ForCausalLM"]}, r"must be \[.Qwen3_5ForConditionalGeneration.\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not supported"),
    ],
)
def test_a_wrapper_that_describes_no_text_model_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **{**WRAPPER, "text_config": SHAPE, **changed})


def test_heads_that_do_not_divide_are_refused_before_memory_is_taken(tmp_path):
    from distill_nemo.models.megatron import transformer_config

    model = read(tmp_path, **SHAPE)
    layout = ParallelismConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    with pytest.raises(ValueError, match=r"linear_num_key_heads = 2 is not divisible by .* = 4"):
        transformer_config(model, layout, torch.float32)


def test_missing_kernels_are_named_on_a_gpu(tmp_path, monkeypatch):
    from distill_nemo.models.megatron import transformer_config

    model = read(tmp_path, **SHAPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match='pip install "flash-linear-attention'):
        transformer_config(model, ParallelismConfig(), torch.bfloat16)


def comes_out_as_a_text_model(path, output):
    """Return the names of tensors that an import and an export give, and the difference of the logits."""
    from distill_nemo.models.checkpoints.agreement import open_with_transformers
    from distill_nemo.models.checkpoints.huggingface import export_hf
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    check_source(resolve(StudentConfig(checkpoint=str(path))))
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        model = resolve(StudentConfig(checkpoint=str(path)))
        export_hf([model_provider(student=model, parallelism=ParallelismConfig())], str(output), model, source=path)
    return type(open_with_transformers(output, torch.float32)).__name__


def test_the_text_model_of_a_whole_model_is_read_and_exported_by_itself(one, tmp_path):
    text = load_file(f"{write_hf(tmp_path / 'text', 'qwen3_5_text')}/model.safetensors")
    write_hf(tmp_path / "whole", "qwen3_5_text")
    whole = wrap(tmp_path / "whole")
    assert one.run(comes_out_as_a_text_model, whole, tmp_path / "out") == ["Qwen3_5ForCausalLM"]
    config, exported = (
        json.loads((tmp_path / "out/config.json").read_text()),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert config["model_type"] == "qwen3_5_text" and "text_config" not in config
    assert exported.keys() == text.keys() and all(torch.equal(exported[name], text[name]) for name in text)


def logits_apart_of(path):
    """Return the difference between the logits of an import and those of transformers on the same directory."""
    from distill_nemo.models.checkpoints.agreement import logits_apart, open_with_transformers
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        model = resolve(StudentConfig(checkpoint=str(path)))
        built = model_provider(student=model, parallelism=ParallelismConfig())
        return logits_apart([built], lambda: open_with_transformers(path, torch.float32), model.vocab_size)


def test_experts_of_a_layer_in_one_tensor_are_read(one, tmp_path):
    """The hub has those of Qwen3.5 so. Exports, like transformers', have a tensor for each."""
    path = Path(write_hf(tmp_path, "qwen3_5_moe_text"))
    tensors = load_file(path / "model.safetensors")
    for i in range(4):
        prefix = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(4)])
            for part in ("gate", "up", "down")
        )
        tensors |= {prefix + "gate_up_proj": torch.cat([gate, up], dim=1), prefix + "down_proj": down}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert one.run(logits_apart_of, path)[0] < 1e-5


def test_a_tensor_under_both_names_is_refused(tmp_path):
    from distill_nemo.models.resolve import resolve

    whole = wrap(tmp_path / "m" if write_hf(tmp_path / "m", "qwen3_5_text") else tmp_path)
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(64)}, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight.* is stored twice"):
        resolve(StudentConfig(checkpoint=str(whole)))


@pytest.mark.parametrize("length", [1, 64, 150])
def test_chunks_give_the_outputs_and_gradients_of_the_recurrence(length):
    from distill_nemo.models.layers.delta_rule import delta_rule as by_chunks

    generator = torch.Generator().manual_seed(0)
    sizes = {"q": 8, "k": 8, "v": 12, "g": None, "beta": None}
    inputs = {
        name: torch.randn(2, length, 3, *([] if size is None else [size]), generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }
    inputs["g"] = -inputs["g"].exp()
    inputs["beta"] = inputs["beta"].sigmoid()
    found = []
    for rule, dtype in ((delta_rule, torch.float64), (by_chunks, torch.float32)):
        leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
        outputs, _ = rule(**leaves)
        outputs.square().sum().backward()
        found.append([outputs.detach(), *(leaf.grad for leaf in leaves.values())])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() < 3e-6 * theirs.norm().clamp(min=1e-3)


def random_weights(size):
    """Return this rank's random weights by name."""
    from distill_nemo.models.checkpoints.local_parameters import local_parameters
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    layout = ParallelismConfig(tensor_model_parallel_size=size)
    with process_groups(layout):
        seed_everything(0)
        sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 507}
        own = {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "full_attention_interval": 2,
        }
        model = resolve(StudentConfig(family="qwen3_5_text", kv_channels=24, family_fields=own, **sizes))
        built = model_provider(student=model, parallelism=layout)
        return {p.name: (p.pieces, p.tensor.detach().clone()) for p in local_parameters(built, model)}


def test_random_delta_nets_are_the_same_at_every_tensor_parallel_size(one, two):
    from distill_nemo.models.checkpoints.local_parameters import rows_of

    (whole,) = one.run(random_weights, 1)
    tensors = {
        (piece.name, row): values
        for name, (pieces, tensor) in whole.items()
        if "layers.0.self_attention" in name
        for piece, rows in rows_of(pieces, tensor)
        for row, values in zip(range(piece.index[0].start, piece.index[0].stop), rows, strict=True)
    }
    halves = two.run(random_weights, 2)
    split = [name for name in whole if "layers.0.self_attention" in name and "out_" not in name]
    assert len(split) == 4
    for half in halves:
        for name in split:
            for piece, rows in rows_of(*half[name]):
                for row, values in zip(range(piece.index[0].start, piece.index[0].stop), rows, strict=True):
                    assert torch.equal(values, tensors[piece.name, row]), (name, row)
    assert all(whole[name][1].std() > 0 for name in split if not name.endswith("dt_bias"))


def test_a_run_is_resumed_at_another_tensor_parallel_size(inputs, one, two, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    student = {"student.checkpoint": write_hf(tmp_path / "student", "qwen3_5_text", seed=2, layers=2, width=32)}
    assert one.run(train, inputs, whole, 1, 1, None, student) == [0]
    two.run(train, inputs, parts, 2, 1, 2, student)
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert one.run(train, inputs, parts, 1, 1, None, student) == [0]
    for line, expected in zip(metrics(parts), metrics(whole), strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)


def built_without_the_patch(path):
    """Return Megatron's error."""
    from distill_nemo.models.layers import gated_delta_net
    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    helped, gated_delta_net._without_kernels = gated_delta_net._without_kernels, contextlib.nullcontext
    try:
        with process_groups(ParallelismConfig()):
            model_provider(student=StudentConfig(checkpoint=path), parallelism=ParallelismConfig())
    except ImportError as error:
        return str(error)
    finally:
        gated_delta_net._without_kernels = helped


def test_megatron_alone_builds_no_delta_net_without_kernels(one, tmp_path):
    assert "FLA is not installed" in one.run(built_without_the_patch, write_hf(tmp_path, "qwen3_5_text"))[0]

"""Students and teachers whose layers differ (Nemotron's NAS models): built, loaded, trained, resharded."""

import copy

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig
from tests.tiny_models import write_hf, write_megatron
from tests.training import metrics, tiny_run
from tests.unit.models.test_model_provider import TOKENS, in_one_process, logits

BLOCKS = [  # Nemotron's format: fewer key-value heads, no attention, no MLP, other widths
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 96}},
    {"attention": {"no_op": True}, "ffn": {"ffn_hidden_size": 64}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True, "ffn_mult": None}},
    {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 32}},
]
HETEROGENEOUS = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507,
    "norm_epsilon": 1e-6, "rotary_base": 1e4, "block_configs": BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a Llama of `BLOCKS` in transformers: (its logits, its tensors as Megatron has them).

    Its layers have sizes of their own. A part that is left out has zero weights, so it adds nothing to the residual.
    """
    path = write_hf(tmp_path_factory.mktemp("llama") / "m")
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(7)
    sizes = [(2, 96), (None, 64), (1, None), (4, 32)]
    for i, (groups, ffn) in enumerate(sizes):
        config = copy.deepcopy(model.config)
        config.num_key_value_heads, config.intermediate_size = groups or 2, ffn or 8
        layer = model.model.layers[i] = LlamaDecoderLayer(config, i)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
        for absent, last in ((groups is None, layer.self_attn.o_proj), (ffn is None, layer.mlp.down_proj)):
            if absent:
                last.weight.data.zero_()
    with torch.no_grad():
        expected = model(TOKENS).logits
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return expected, _megatron_tensors(weights, sizes)


def _megatron_tensors(hf, sizes):
    pad = torch.zeros(5, 64)
    tensors = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], pad]),
        "output_layer.weight": torch.cat([hf["lm_head.weight"], pad]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for i, (groups, ffn) in enumerate(sizes):
        one = {k.removeprefix(f"model.layers.{i}."): t for k, t in hf.items() if k.startswith(f"model.layers.{i}.")}
        name = f"decoder.layers.{i}."
        if groups:
            qkv = [one[f"self_attn.{n}_proj.weight"].unflatten(0, (groups, -1)) for n in "qkv"]
            tensors[name + "self_attention.linear_qkv.weight"] = torch.cat(qkv, dim=1).flatten(0, 1)
            tensors[name + "self_attention.linear_qkv.layer_norm_weight"] = one["input_layernorm.weight"]
            tensors[name + "self_attention.linear_proj.weight"] = one["self_attn.o_proj.weight"]
        if ffn:
            gate_up = [one["mlp.gate_proj.weight"], one["mlp.up_proj.weight"]]
            tensors[name + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
            tensors[name + "mlp.linear_fc1.layer_norm_weight"] = one["post_attention_layernorm.weight"]
            tensors[name + "mlp.linear_fc2.weight"] = one["mlp.down_proj.weight"]
    return tensors


def logits_of_heterogeneous(path):
    from distill_nemo.models.provider import model_provider

    return logits(model_provider(student=StudentConfig(str(path), **HETEROGENEOUS), parallelism=ParallelismConfig()))


def test_layers_that_differ_come_from_a_megatron_checkpoint(llama, one, tmp_path):
    expected, tensors = llama
    one.run(in_one_process, write_megatron, tmp_path / "m", tensors)
    ours = one.run(in_one_process, logits_of_heterogeneous, tmp_path / "m")[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    other = tensors | {"decoder.layers.1.mlp.linear_fc1.weight": torch.zeros(96, 64)}
    one.run(in_one_process, write_megatron, tmp_path / "other", other)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.linear_fc1\.weight has shape \(96, 64\), needs \(128, 64\)"):
        one.run(in_one_process, logits_of_heterogeneous, tmp_path / "other")


def train(inputs, output, pipeline=1, steps=8, tensor=1, export=False):
    """Train a tiny student whose layers differ, from the Megatron checkpoint beside `output`."""
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps)
    run.student = StudentConfig(str(output.parent / "m"), **HETEROGENEOUS)
    run.optimizer.decay_steps, run.checkpoint.export = 8, export
    run.parallelism.tensor_model_parallel_size, run.parallelism.pipeline_model_parallel_size = tensor, pipeline
    run_config(run)


def test_layers_that_differ_train_save_resume_and_reshard(llama, inputs, one, two, tmp_path):
    one.run(in_one_process, write_megatron, tmp_path / "m", llama[1])
    one.run(train, inputs, tmp_path / "whole")
    two.run(train, inputs, tmp_path / "pp2", 2)
    two.run(train, inputs, tmp_path / "moved", 2, 4)
    one.run(train, inputs, tmp_path / "moved")
    for layout in ("pp2", "moved"):
        for line, expected in zip(metrics(tmp_path / layout), metrics(tmp_path / "whole"), strict=True):
            numbers = {key: value for key, value in expected.items() if key != "kind"}
            assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6), layout


def test_what_cannot_be_is_refused(llama, inputs, one, two, tmp_path):
    one.run(in_one_process, write_megatron, tmp_path / "m", llama[1])
    with pytest.raises(
        ValueError, match=r"num_query_groups of layer 2 = 1 is neither a multiple nor a divisor of parallelism.tensor"
    ):
        two.run(train, inputs, tmp_path / "out", 1, 8, 2)
    with pytest.raises(
        ValueError, match=r"transformers has no model whose layers differ; train with checkpoint.export="
    ):
        one.run(train, inputs, tmp_path / "out", 1, 8, 1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: blocks.pop(), "block_configs has 3 entries, num_layers = 4"),
        (lambda blocks: blocks[0].pop("mlp"), r"block_configs\[0\] = .* cannot be read .*write "),
        (lambda blocks: blocks[3]["mlp"].update(ffn_hidden_size=None), r"block_configs\[3\] = .*leaves out a size"),
        (
            lambda blocks: blocks[1]["attention"].update(replace_with_linear=True),
            "replace_with_linear is not supported",
        ),
        (lambda blocks: blocks[2]["attention"].update(n_heads_in_group=3), r"must be a multiple of n_heads_in_group"),
    ],
)
def test_block_configs_that_cannot_be_read_are_named(change, message):
    from distill_nemo.models.resolve import resolve

    blocks = copy.deepcopy(BLOCKS)
    change(blocks)
    with pytest.raises(ValueError, match=message):
        resolve(StudentConfig(**HETEROGENEOUS | {"block_configs": blocks}))

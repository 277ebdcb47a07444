"""Nemotron-H: its layers and their spellings, Mamba's scan, names of tensors, refusals, and layouts."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import known, write_hf

pytestmark = pytest.mark.skipif(not known("nemotron_h"), reason="this version of transformers lacks it")

NANO_9B_V2 = {  # facts of NVIDIA's config.json, without its sizes
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "num_hidden_layers": 56,
    "time_step_limit": [0.0, math.inf],
    "time_step_min": 0.001,
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "use_mamba_kernels": True,
    "expand": 2,
}
SIZES = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 507,
    "kv_channels": 24,
}
OWN = {
    "hybrid_override_pattern": "M*-",
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 4,
    "ssm_state_size": 16,
}


def recurrence(x, dt, a, b, c):
    """Return the outputs by definition, one token after another."""
    state, outputs = torch.zeros(len(x), *x.shape[2:], b.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        written = (dt[:, t, ..., None] * x[:, t])[..., None] * b[:, t, :, None, None]
        state = (dt[:, t] * a).exp()[..., None, None] * state + written
        outputs.append((state * c[:, t, :, None, None]).sum(-1))
    return torch.stack(outputs, 1)


def scan_inputs(length, seed=0):
    """Return x, dt, a, b, c: two groups of three heads, slow and fast decays."""
    draw = torch.Generator().manual_seed(seed)
    x, dt = torch.randn(2, length, 2, 3, 4, generator=draw), torch.rand(2, length, 2, 3, generator=draw)
    b, c = (torch.randn(2, length, 2, 5, generator=draw) for _ in range(2))
    return x, dt, -torch.tensor([[0.01, 0.1, 1.0], [2.0, 8.0, 16.0]]), b, c


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (16, 4), (17, 4), (37, 8), (30, 128)])
def test_the_scan_and_its_gradients_are_those_of_the_recurrence(length, chunk):
    setup_device()
    from distill_nemo.models.layers.state_space import scan

    def results(function, dtype, *more):
        inputs = [each.to(dtype).requires_grad_() for each in scan_inputs(length)]
        output = function(*inputs, *more)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [output, *torch.autograd.grad((output * weights).sum(), inputs)]

    expected = results(recurrence, torch.float64)
    for ours, theirs in zip(results(scan, torch.float64, chunk), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
    for ours, theirs in zip(results(scan, torch.float32, chunk), expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.fixture
def source(tmp_path):
    return Path(write_hf(tmp_path / "m", "nemotron_h"))


def state(source, *absent, **change):
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))


def resolved(source, **change):
    from distill_nemo.models.resolve import resolve

    return resolve(StudentConfig(str(source), **change))


@pytest.mark.parametrize(
    ("absent", "change"),
    [
        ((), {"time_step_min": 0.7, "chunk_size": 8}),
        (("layers_block_type",), {"hybrid_override_pattern": "M-*M", "num_hidden_layers": 4}),
        (("n_groups", "conv_kernel"), {"mamba_n_groups": 4, "mamba_d_conv": 4, "chunk_size": 8}),
        (("time_step_limit",), {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "sliding_window": 4}),
    ],
    ids=["steps below their minimum, several chunks", "pattern", "names of other versions", "not read"],
)
def test_logits_are_those_of_transformers_with_the_authors_kernels(source, absent, change):
    """They clamp no step and mix chunks rightly; transformers' own code does so with one chunk and a low minimum."""
    state(source, *absent, **change)
    setup_device()
    from distill_nemo.models.source_check import check_source

    before = resolved(source)
    check_source(before)
    assert [(layer.mixer, layer.num_query_groups, layer.ffn_hidden_size) for layer in before.layers] == [
        ("mamba", None, None),
        (None, None, 96),
        (None, 2, None),
        ("mamba", None, None),
    ]


def test_a_real_configuration_is_read(tmp_path):
    source = Path(write_hf(tmp_path / "m", "nemotron_h", layers=1))
    state(source, "layers_block_type", "rms_norm_eps", **NANO_9B_V2)
    for file in source.glob("*.safetensors"):
        file.unlink()
    setup_device()
    model = resolved(source)
    assert model.num_layers == 56 and sum(layer.mixer == "mamba" for layer in model.layers) == 27
    assert sum(layer.num_query_groups is not None for layer in model.layers) == 4 and model.ropes == ()


def test_the_embedding_may_have_transformers_name(source):
    setup_device()
    file = source / "model.safetensors"
    hub = resolved(source)
    tensors = load_file(file)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, file, {"format": "pt"})
    from distill_nemo.models.source_check import check_source

    model = resolved(source)
    assert model == hub
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(str(source), output_loading_info=True)
    if found["missing_keys"]:  # 5.24 has forgotten the name, and draws a random embedding
        with pytest.raises(ValueError, match="is read differently by transformers"):
            check_source(model)
    else:
        check_source(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias is not supported"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is not supported"),
        ({"use_conv_bias": False}, "use_conv_bias = false is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"residual_in_fp32": True}, "residual_in_fp32 is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ({"mlp_hidden_act": "silu"}, "hidden_act silu is not supported"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu' is not supported"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit [0.001, 0.1] is not supported"),
        ({"mamba_dt_limit": [0.0, 0.1]}, "time_step_limit [0.0, 0.1] is not supported"),
        ({"time_step_limit": "none"}, "time_step_limit 'none' is not supported"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is not supported"),
        ({"moe_latent_size": 32}, "moe_latent_size 32 is not supported"),
        ({"layers_block_type": ["mamba", "moe", "mlp", "mlp"], "norm_topk_prob": False}, "norm_topk_prob = False with"),
        ({"layers_block_type": ["mamba", "moe", "mlp", "mlp"], "n_routed_experts": "8"}, "n_routed_experts must be a"),
        ({"layers_block_type": ["mamba", "rwkv"]}, "layers_block_type must hold linear_attention, mamba,"),
        ({"layers_block_type": "M-*M"}, "layers_block_type must hold linear_attention, mamba,"),
        ({"layers_block_type": None, "hybrid_override_pattern": ["M"] * 4}, "hybrid_override_pattern must be a letter"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M|M*"}, "got ['|']"),
        ({"layers_block_type": None}, "hybrid_override_pattern must be a letter for each of"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M" * 10001}, "at most 10,000 layers"),
        ({"mamba_num_heads": 6}, "mamba_num_heads = 6 is not divisible by n_groups = 4"),
        ({"mamba_num_heads": "8"}, "mamba_num_heads must be int, got '8'"),
        ({"ssm_state_size": 10**9}, "ssm_state_size must be at least 1 and at most 16777216"),
        ({"conv_kernel": 5}, "conv_kernel must be at least 2 and at most 4, got 5"),
        ({"mamba_head_dim": 16}, "has shape"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(source, change, message):
    state(source, **change)
    setup_device()
    with pytest.raises(ValueError) as raised:
        resolved(source)
    assert message in str(raised.value) and str(source) in str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context_parallel_size": 2}, "Mamba layers are not supported under parallelism.context_parallel_size = 2"),
        (
            {"tensor_model_parallel_size": 8},
            "4 groups of Mamba's heads are not divisible by parallelism.tensor",
        ),
    ],
)
def test_layouts_without_an_exact_scan_are_refused(sizes, message):
    setup_device()
    from distill_nemo.models.megatron import transformer_config
    from distill_nemo.models.resolve import resolve

    student = resolve(StudentConfig(family="nemotron_h", family_fields=OWN, **SIZES | {"num_attention_heads": 8}))
    with pytest.raises(ValueError, match=message):
        transformer_config(student, ParallelismConfig(**sizes), torch.float32)


def test_a_gpu_without_the_kernels_is_refused_with_the_command(monkeypatch):
    setup_device()
    from distill_nemo.models.layers.mamba import fused_kernel

    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(
        ValueError, match=r"need mamba_ssm and causal_conv1d on a GPU .*pip install 'distill-nemo\[ssm\]'"
    ):
        fused_kernel.__wrapped__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, "hybrid_override_pattern has 3 letters, num_layers = 4"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}, "has 0 layers E, num_experts = 4"),
        ({"family_fields": OWN | {"hybrid_override_pattern": "M*E"}}, "has 1 layers E, num_experts = None"),
        ({"moe_ffn_hidden_size": 48}, "moe_ffn_hidden_size = 48: set num_experts, too"),
        ({"rope_scaling": {"rope_type": "default"}}, 'rope_scaling: family "nemotron_h" has no rotary embeddings'),
        ({"block_configs": [{"attention": {"no_op": True}, "mlp": {"no_op": True}}] * 3}, "block_configs: hybrid_over"),
    ],
)
def test_a_student_that_contradicts_itself_is_refused(change, message):
    setup_device()
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError, match=message):
        resolve(StudentConfig(**{"family": "nemotron_h", "family_fields": OWN} | SIZES | change))


def test_a_student_of_random_weights_opens_in_transformers_with_the_same_fields(tmp_path):
    from transformers import AutoConfig

    setup_device()
    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    student = resolve(StudentConfig(family="nemotron_h", family_fields=OWN, norm_epsilon=1e-4, **SIZES))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(student, torch.float32)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.layers_block_type == ["linear_attention", "full_attention", "mlp"]
    assert (theirs.layer_norm_epsilon, theirs.mlp_hidden_act, theirs.pad_token_id) == (1e-4, "relu2", None)
    assert {name: getattr(theirs, name) for name in OWN} == OWN


def weights(layout):
    """Return the tensors of a model of random weights, assembled from a layout's ranks."""
    setup_device()
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(layout):
        from distill_nemo.models.checkpoints.local_parameters import local_parameters
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(3)
        student = resolve(StudentConfig(family="nemotron_h", family_fields=OWN, **SIZES))
        built = model_provider(student=student, parallelism=layout)
        return [(each.pieces, each.tensor.detach().clone().numpy()) for each in local_parameters(built, student)]


def test_random_weights_are_the_same_at_every_tensor_parallel_size(one, two):
    from distill_nemo.models.checkpoints.local_parameters import rows_of

    def whole(ranks):
        """Return every tensor whose rows all ranks together hold."""
        found = {}
        for pieces, values in (parameter for rank in ranks for parameter in rank):
            for piece, rows in rows_of(pieces, torch.from_numpy(values)):
                if piece.name:
                    found.setdefault(piece.name, {})[tuple(part.start for part in piece.index)] = rows
        return {name: torch.cat([rows for _, rows in sorted(parts.items())]) for name, parts in found.items()}

    alone = whole(one.run(weights, ParallelismConfig()))
    split = whole(two.run(weights, ParallelismConfig(tensor_model_parallel_size=2)))
    assert len(alone) == 20 and alone.keys() == split.keys()
    by_columns = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
    assert all(torch.equal(alone[name], split[name]) for name in alone if not name.endswith(by_columns))

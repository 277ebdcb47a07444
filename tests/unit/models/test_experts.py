"""Experts as transformers computes them: routers, shared experts, dense layers between, stored together."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.tiny_models import write_hf
from tests.unit.models.test_pieces import round_trip

GATE = "model.layers.1.mlp.gate."


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return Path(write_hf(tmp_path_factory.mktemp("m") / "glm", "glm4_moe", layers=2))


def changed(source, target, edit=lambda tensors: None, **config):
    """Write a copy of a directory with other tensors and fields of config.json. Return the path."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    stated = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(stated))
    return target


def resolved(path):
    from distill_nemo.models.resolve import resolve

    return resolve(StudentConfig(str(path)))


def check_logits(path):
    """Compare our logits with those of transformers."""
    setup_device()
    from distill_nemo.models import source_check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_check, "TOLERANCE", 1e-5)
        source_check.check_source(resolved(path))


def stack_experts(tensors):
    """Store the experts of a layer together, as transformers 5 does with `save_original_format=False`."""
    for layer in {name.split(".experts.")[0] for name in tensors if ".mlp.experts." in name}:
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        take = {
            kind: [tensors.pop(f"{layer}.experts.{i}.{kind}_proj.weight") for i in range(count)]
            for kind in ("gate", "up", "down")
        }
        pairs = zip(take["gate"], take["up"], strict=True)
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{layer}.experts.down_proj"] = torch.stack(take["down"])


def test_experts_stored_together_are_read(one, glm, tmp_path):
    stacked = changed(glm, tmp_path / "in", stack_experts)
    if int(transformers.__version__.split(".")[0]) >= 5:  # transformers 4 cannot read them
        check_logits(stacked)
    assert one.run(round_trip, str(stacked), str(tmp_path / "out"), Layout(), 10**9) == [[]]
    before, after = load_file(glm / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", [(8, 97, 64), (9, 96, 64), (8, 96, 63), (10**9, 0, 0), (768, 64)])
def test_a_stack_of_another_shape_is_refused_by_name(glm, tmp_path, shape):
    def edit(tensors):
        stack_experts(tensors)
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(shape)

    with pytest.raises(ValueError, match=r"does not fit its architecture:(.|\n)*layers\.1\.mlp\.experts\.") as raised:
        resolved(changed(glm, tmp_path / "in", edit))
    assert len(str(raised.value)) < 1000


def alike(tensors):
    """Give some experts equal scores, at the border of the choice too."""
    tensors[GATE + "weight"][:] = tensors[GATE + "weight"][:1]
    tensors[GATE + "e_score_correction_bias"][:] = 0.0


def busy(tensors):
    """Send every token to the same two experts."""
    tensors[GATE + "e_score_correction_bias"][2:4] += 100.0


def far(tensors):
    """Make most scores 0 or 1 to the last bit."""
    tensors[GATE + "weight"] *= 100.0


@pytest.mark.parametrize("edit", [alike, busy, far])
@pytest.mark.parametrize(
    "routing", [{}, {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}, {"n_group": 1, "topk_group": 1}]
)
def test_routers_choose_and_weigh_as_transformers_does(glm, tmp_path, edit, routing):
    if edit is far and routing.get("n_group") == 4 and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 prefers experts of other groups to a sum of score and bias below 0")
    check_logits(changed(glm, tmp_path / "in", edit, **routing))


REFUSED = [
    ({"norm_topk_prob": False}, "norm_topk_prob = False with num_experts_per_tok = 2 is not supported"),
    ({"num_experts_per_tok": 4}, "Megatron-Core compares groups by the sum of num_experts_per_tok / topk_group scores"),
    ({"n_group": 8}, "n_group = 8 and topk_group = 1 with num_experts = 8"),
    ({"n_group": 3}, "n_group = 3 must divide num_experts = 8, and be at least topk_group = 1"),
    ({"topk_group": 3}, "n_group = 2 must divide num_experts = 8, and be at least topk_group = 3"),
    ({"n_group": 0}, "n_group must be at least 1"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor must be above 0"),
    ({"n_shared_experts": 0}, "n_shared_experts must be at least 1"),
    ({"n_shared_experts": "2"}, "n_shared_experts must be int, got '2'"),
    ({"first_k_dense_replace": 2}, "first_k_dense_replace = 2 leaves no layer with experts, num_layers = 2"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace must be at least 0"),
    ({"use_qk_norm": "yes"}, "use_qk_norm must be bool, got 'yes'"),
    ({"n_routed_experts": None}, "n_routed_experts must be a positive integer, got None"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_routing_that_is_computed_differently_is_refused_by_name(glm, tmp_path, change, message):
    path = changed(glm, tmp_path / "in", **change)
    with pytest.raises(ValueError) as raised:
        resolved(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_groups_that_are_all_chosen_are_no_groups(glm, tmp_path):
    both, none = ({"n_group": 2, "topk_group": 2}, {"n_group": 1, "topk_group": 1})
    experts = [resolved(changed(glm, tmp_path / str(i), **how)).experts for i, how in enumerate((both, none))]
    assert experts[0] == experts[1] != resolved(glm).experts


def in_sixteen_bits(path, output):
    """Import and export in bf16. Return the dtype of the bias, and the dtype in which the logits are computed."""
    setup_device()
    with process_groups(Layout().config()):
        from distill_nemo.models.checkpoints.write_safetensors import write_weights
        from distill_nemo.models.provider import model_provider

        student = resolved(path)
        built = model_provider(student=student, parallelism=Layout().config(), dtype=torch.bfloat16)
        Path(output).mkdir()
        write_weights([built], student, Path(output))
        router = built.decoder.layers[1].mlp.router
        hidden = torch.randn(3, 1, 64, dtype=torch.bfloat16)
        return router.expert_bias.dtype, router.gating(hidden).dtype, router(hidden)[0].dtype


def test_in_bf16_a_router_computes_in_fp32_and_keeps_an_fp32_bias(one, glm, tmp_path):
    def edit(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()

    path = changed(glm, tmp_path / "in", edit)
    assert one.run(in_sixteen_bits, str(path), str(tmp_path / "out")) == [(torch.float32,) * 3]
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("rope", "partial"),
    [
        ({}, 0.5),
        ({"partial_rotary_factor": 1.0}, 1.0),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 0.5),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.25}}, 0.25),
    ],
)
def test_half_of_a_heads_channels_are_rotated_by_default(glm, tmp_path, rope, partial):
    from distill_nemo.models.families.huggingface import to_huggingface

    path = changed(glm, tmp_path / "in")
    config = json.loads((path / "config.json").read_text())
    for name in ("rope_parameters", "partial_rotary_factor"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config | rope))
    model = resolved(path)
    assert model.ropes[0].partial_rotary_factor == partial
    check_logits(path)
    (path / "config.json").write_text(json.dumps(to_huggingface(model, torch.float32)))
    assert resolved(path) == model


def test_a_layer_that_predicts_further_tokens_is_left_out_and_no_other(glm, tmp_path):
    def one_more(tensors):
        names = [name for name in tensors if name.startswith("model.layers.1.")]
        tensors.update({name.replace(".1.", ".2.", 1): tensors[name].clone() for name in names})

    def of_further_tokens(tensors):
        one_more(tensors)
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)

    check_logits(changed(glm, tmp_path / "in", of_further_tokens, num_nextn_predict_layers=1))
    with pytest.raises(ValueError, match="num_hidden_layers = 2, the safetensors hold 3 layers"):
        resolved(changed(glm, tmp_path / "more", one_more, num_nextn_predict_layers=1))

"""Mixtures of experts: logits and all gradients of a distillation equal transformers' at each layout; refusals.

Gradients are compared with transformers' in fp64, as in test_mcore_distillation_adjust.py, relative to the largest
entry of the tensor. One exception: transformers computes the router's softmax in fp32 whatever the dtype, so the
reference itself is rounded there to about 6e-8, the precision that Megatron has everywhere. The tolerance is the same.
"""

import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from distill_nemo.config import StudentConfig, TeacherConfig
from tests.distillation import Case, Layout, gradients, megatron_step, worst_errors
from tests.distillation_reference import reference
from tests.spawn import Gloo
from tests.tiny_models import write_hf
from tests.training import metrics, tiny_run
from tests.unit.models.test_huggingface import logits_of, transformers_logits

LAYOUTS = {
    "one": (1, Layout()),
    "dp2": (2, Layout()),
    "ep2": (2, Layout(expert=2)),
    "tp2": (2, Layout(tensor=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline=2)),
    "tp2_ep2": (4, Layout(tensor=2, sequence_parallel=True, expert=2)),
}
ALWAYS = "tp2_ep2"  # tests/parity has the others
EACH = [pytest.param(name, marks=[] if name == ALWAYS else pytest.mark.long) for name in LAYOUTS]
DISTILLATION = {"lm_weight": 0.3, "logits_weight": 0.7, "temperature": 2.0}
MOE = ("qwen3_moe", "qwen3_moe_not_normalised")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_hf(root / "teacher", "qwen3_moe", layers=4),
        "qwen3_moe": write_hf(root / "moe", "qwen3_moe", seed=2, layers=2),
        "qwen3_moe_not_normalised": write_hf(root / "moe_2", "qwen3_moe_not_normalised", seed=2, layers=2),
        "dense": write_hf(root / "dense", "qwen3", seed=3, width=32, layers=2),
        "glm4_moe": write_hf(root / "glm4_moe", "glm4_moe", seed=4, width=32, layers=2),
    }


@pytest.fixture(scope="module")
def groups(one, two):
    with Gloo(4, init=False, timeout=200) as four:
        yield {1: one, 2: two, 4: four}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MOE)
def test_logits_equal_transformers(models, groups, family, layout):
    processes, sizes = LAYOUTS[layout]
    answers = groups[processes].run(logits_of, models[family], sizes.tensor, sizes.pipeline, sizes.expert)
    theirs = transformers_logits(models[family])
    for ours in (torch.as_tensor(answer) for answer in answers if answer is not None):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("layout", EACH)
@pytest.mark.parametrize("student", ["qwen3_moe", "dense"])
def test_every_gradient_is_that_of_transformers_in_fp64(models, groups, tmp_path, student, layout):
    processes, sizes = LAYOUTS[layout]
    case = Case(models[student], models["teacher"], DISTILLATION)
    means = groups[processes].run(megatron_step, case, sizes, str(tmp_path))
    metric, gradient = worst_errors(means, groups[1].run(gradients, str(tmp_path))[0], reference(case))
    assert metric < 1e-5 and gradient < 1e-5, (metric, gradient)


def experts_of(student, sizes):
    """Return {(layer, number of the expert, matrix): weight} of this rank's random weights."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    with process_groups(sizes.config()):
        from distill_nemo.models.provider import model_provider
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(3)
        model = model_provider(student=student, parallelism=sizes.config())
        return {
            (i, number, kind): getattr(expert, kind).weight.detach().numpy()
            for i, layer in enumerate(model.decoder.layers)
            for number, expert in zip(layer.mlp.local_expert_indices, layer.mlp.experts.local_experts, strict=True)
            for kind in ("linear_fc1", "linear_fc2")
        }


def test_random_experts_differ_and_are_the_same_at_every_layout(groups):
    """With Megatron's own weights, experts 2 and 3 of two expert-parallel ranks would be copies of experts 0 and 1."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 507}
    student = StudentConfig(
        family="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_ffn_hidden_size=48, init_std=0.1, **sizes
    )
    (alone,) = groups[1].run(experts_of, student, Layout())
    for kind in ("linear_fc1", "linear_fc2"):
        weights = [torch.as_tensor(w).flatten() for (_, _, k), w in alone.items() if k == kind]
        between = torch.corrcoef(torch.stack(weights)) - torch.eye(8)
        assert len(weights) == 8 and between.abs().max() < 0.1
    first, second = groups[2].run(experts_of, student, Layout(expert=2))
    assert not first.keys() & second.keys()
    both = first | second
    assert both.keys() == alone.keys() and all((both[place] == alone[place]).all() for place in alone)
    for rank, part in enumerate(groups[2].run(experts_of, student, Layout(tensor=2, sequence_parallel=True))):
        for place, weight in part.items():
            whole = torch.as_tensor(alone[place])
            if place[2] == "linear_fc1":
                whole = torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])  # gate and up
            else:
                whole = whole.chunk(2, dim=1)[rank]
            assert torch.equal(torch.as_tensor(weight), whole)


class Grouped(nn.Module):
    """Module with the local experts' weights as Transformer Engine keeps them: `weight0`, `weight1`, ..."""

    def __init__(self, linears):
        super().__init__()
        self.num_gemms = len(linears)
        for i, linear in enumerate(linears):
            self.register_parameter(f"weight{i}", nn.Parameter(linear.weight.detach().clone()))


class GroupedExperts(nn.Module):
    """Stand-in for `TEGroupedMLP`, which needs a GPU."""

    def __init__(self, experts):
        super().__init__()
        self.config, self.num_local_experts = experts.config, experts.num_local_experts
        for name in ("linear_fc1", "linear_fc2"):
            setattr(self, name, Grouped([getattr(expert, name) for expert in experts.local_experts]))


def grouped_weights(path, output, sizes):
    """Return True if grouped experts are filled like single ones; on one process, also the content of their export."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    with process_groups(sizes.config()):
        from distill_nemo.models.checkpoints import huggingface
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve

        student = resolve(StudentConfig(path))
        single = model_provider(student=student, parallelism=sizes.config())
        grouped = model_provider(student=student, parallelism=sizes.config())
        for layer in grouped.decoder.layers:
            layer.mlp.experts = GroupedExperts(layer.mlp.experts)
            for parameter in layer.mlp.experts.parameters():
                nn.init.zeros_(parameter)
        huggingface.load_hf_weights(grouped, student)
        equal = [
            torch.equal(getattr(expert, name).weight, getattr(getattr(b.mlp.experts, name), f"weight{i}"))
            for a, b in zip(single.decoder.layers, grouped.decoder.layers, strict=True)
            for i, expert in enumerate(a.mlp.experts.local_experts)
            for name in ("linear_fc1", "linear_fc2")
        ]
        if dist.get_world_size() == 1:
            with mock.patch.object(huggingface, "check_export"):  # the stand-in has no forward
                huggingface.export_hf([grouped], output, student)
        return equal


@pytest.mark.parametrize("layout", ["one", "ep2", "tp2"])
def test_grouped_experts_are_read_and_written_as_single_ones(models, groups, tmp_path, layout):
    processes, sizes = LAYOUTS[layout]
    for equal in groups[processes].run(grouped_weights, models["qwen3_moe"], str(tmp_path / "out"), sizes):
        assert len(equal) == 2 * 2 * 4 // sizes.expert and all(equal)
    if processes == 1:
        before, after = (load_file(f"{p}/model.safetensors") for p in (models["qwen3_moe"], tmp_path / "out"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def train(inputs, models, output, student, sizes, steps=8):
    """Run the whole training loop on this rank."""
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps)
    run.student, run.teacher = StudentConfig(models[student]), TeacherConfig(models["teacher"])
    run.parallelism, run.optimizer.decay_steps = sizes.config(), 8
    run_config(run)


@pytest.mark.parametrize(
    "student", ["qwen3_moe", *(pytest.param(x, marks=pytest.mark.long) for x in ("dense", "glm4_moe"))]
)
def test_a_run_gives_one_curve_at_every_layout_and_resumes(inputs, models, groups, tmp_path, student):
    curves = {}
    for layout in ("one", "ep2", "tp2"):
        processes, sizes = LAYOUTS[layout]
        groups[processes].run(train, inputs, models, tmp_path / layout, student, sizes)
        curves[layout] = metrics(tmp_path / layout)
    groups[2].run(train, inputs, models, tmp_path / "parts", student, LAYOUTS["ep2"][1], 4)
    groups[2].run(train, inputs, models, tmp_path / "parts", student, LAYOUTS["ep2"][1])
    assert losses(metrics(tmp_path / "parts")) == losses(curves["ep2"]), "bit for bit"
    groups[2].run(train, inputs, models, tmp_path / "resharded", student, LAYOUTS["ep2"][1], 4)
    groups[1].run(train, inputs, models, tmp_path / "resharded", student, Layout())
    curves["resharded"] = metrics(tmp_path / "resharded")
    expected = losses(curves.pop("one"))
    for layout, lines in curves.items():
        assert losses(lines) == pytest.approx(expected, rel=1e-4), layout


def losses(lines):
    """Return training losses and gradient norms by step."""
    trained = [line for line in lines if line["kind"] == "train"]
    return {(line["step"], name): line[name] for line in trained for name in ("lm_loss", "kd_loss", "grad_norm")}


def test_extra_states_of_grouped_experts_are_left_out(monkeypatch):
    """Transformer Engine keeps one for each expert, and numbers all but the first."""
    from distill_nemo.checkpoint import state

    monkeypatch.setattr(state, "_metadata", dict)
    names = ["model.a.weight", "model.a._extra_state", "model.a._extra_state1", "model.a._extra_state12"]
    model = nn.Linear(1, 1)
    model.sharded_state_dict = lambda prefix, metadata: dict.fromkeys(names)
    assert list(state.model_state(model)) == names[:1]


@pytest.mark.parametrize(("dtype", "usable"), [(torch.bfloat16, True), (torch.float32, False)])
def test_fp32_is_not_left_to_transformer_engine(monkeypatch, dtype, usable):
    """Transformer Engine's products would be TF32."""
    from distill_nemo.models.layers.specs import transformer_engine_usable

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert transformer_engine_usable(dtype) is usable

"""Mixtures of experts: logits and every gradient of a distillation are transformers' at each layout, and the refusals.

Gradients are compared with transformers' in fp64, as in test_mcore_distillation_adjust.py, relative to the largest
entry of the tensor. But for one thing: transformers takes the router's softmax in fp32 whatever the dtype, so the
reference itself is rounded there to about 6e-8, the precision that Megatron has everywhere. The tolerance is the same.
"""

import pytest
import torch

from tests.distillation import Case, Layout, gradients, megatron_step
from tests.distillation_reference import reference
from tests.spawn import Gloo
from tests.tiny_models import write_hf
from tests.unit.test_huggingface import logits_of, transformers_logits

LAYOUTS = {
    "one": (1, Layout()),
    "dp2": (2, Layout()),
    "ep2": (2, Layout(expert=2)),
    "tp2": (2, Layout(tensor=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline=2)),
    "tp2_ep2": (4, Layout(tensor=2, sequence_parallel=True, expert=2)),
}
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


def by_expert(named):
    """Transformers keeps a layer's experts in one parameter; its files, and we, have one for each."""
    split = {}
    for name, tensor in named.items():
        layer, _, last = name.rpartition(".mlp.experts.")
        if not layer:
            split[name] = tensor
            continue
        for i, one in enumerate(tensor):
            parts = {"gate_proj": one[: len(one) // 2], "up_proj": one[len(one) // 2 :]}
            parts = {"down_proj": one} if last == "down_proj" else parts
            split |= {f"{layer}.mlp.experts.{i}.{part}.weight": value for part, value in parts.items()}
    return split


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("student", ["qwen3_moe", "dense"])
def test_every_gradient_is_that_of_transformers_in_fp64(models, groups, tmp_path, student, layout):
    processes, sizes = LAYOUTS[layout]
    case = Case(models[student], models["teacher"], DISTILLATION)
    means = groups[processes].run(megatron_step, case, sizes, str(tmp_path))
    got = groups[1].run(gradients, str(tmp_path))[0]
    expected_means, expected = reference(case)
    for ranks_means in means:
        for name, value in expected_means.items():
            assert ranks_means[name] == pytest.approx(value, rel=1e-5), name
    expected = by_expert(expected)
    assert got.keys() == expected.keys()
    errors = {name: float((got[name].double() - e).abs().max() / e.abs().max()) for name, e in expected.items()}
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:3]

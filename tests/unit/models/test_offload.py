"""A teacher whose layers' weights stay in host memory computes the same, and is not on the device."""

import pytest
import torch

from distill_nemo.runtime.device import setup_device
from tests.training import changed, metrics, tiny_run

LAYERS = ["decoder.layers.1:decoder.layers.3"]
HIDDEN = {"hidden_loss": "mse", "hidden_layers": LAYERS, "hidden_weight": 0.5, "lm_weight": 0.2}
LAYOUTS = {
    "tensor, sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
}


def blocks(count=3, width=16):
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Linear(width, width, bias=False) for _ in range(count)]
    for block in made:
        block.weight.data.copy_(torch.randn(width, width, generator=generator))
    return [block.requires_grad_(False) for block in made]


def resident(layers):
    return [all(p.numel() for p in layer.parameters()) for layer in layers]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layers_have_weights_in_their_turn_only(count):
    from distill_nemo.models.distillation.offload import HostWeights

    device = setup_device()
    x = torch.randn(4, 16, device=device)
    expected = torch.nn.Sequential(*blocks(count)).to(device)(x)
    layers, seen = blocks(count), []
    held = HostWeights(layers, device)
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append((resident(layers), len(held.copies))))
    for _ in range(3):
        assert not any(resident(layers))
        assert torch.equal(torch.nn.Sequential(*layers)(x), expected)
    assert seen == 3 * [([i == j for i in range(count)], min(count, 2)) for j in range(count)]
    assert len(held.copies) == (count > 1), "the first layer's, for the next micro batch"


def test_weights_that_learn_are_refused():
    from distill_nemo.models.distillation.offload import HostWeights

    with pytest.raises(ValueError, match="only frozen layers"):
        HostWeights([torch.nn.Linear(4, 4)], setup_device())


def train(inputs, output, fields):
    """Return metrics, and the number of elements in the teacher's layers afterwards."""
    from distill_nemo.models import provider
    from distill_nemo.training.entry import run_config

    teachers, build = [], provider._teacher_provider

    def building(*args):
        teachers.append(build(*args))
        return teachers[-1]

    provider._teacher_provider = building
    try:
        run_config(changed(tiny_run(inputs, output), fields))
    finally:
        provider._teacher_provider = build
    return sum(p.numel() for teacher in teachers for p in teacher.decoder.layers.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_the_same_to_the_last_bit(inputs, two, tmp_path, layout):
    fields = {f"parallelism.{name}": value for name, value in LAYOUTS[layout].items()}
    fields |= {f"distillation.{name}": value for name, value in HIDDEN.items()}
    there = two.run(train, inputs, tmp_path / "there", fields)
    away = two.run(train, inputs, tmp_path / "away", fields | {"distillation.offload_teacher": True})
    assert all(there) and not any(away)
    assert metrics(tmp_path / "away") == metrics(tmp_path / "there")

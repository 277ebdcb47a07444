"""Scheduled weights and temperatures reach every loss, and the metrics."""

import pytest

from tests.distributed.checkpoint.test_resume import train
from tests.training import metrics

FIELDS = {"temperature": 2.5, "lm_weight": 0.25, "logits_weight": 0.5}
WAYS = {
    "fused": {},
    "whole logits": {"distillation.fused_linear": False},
    "hidden": {
        "distillation.hidden_loss": "mse",
        "distillation.hidden_layers": ["decoder.layers.0:decoder.layers.1"],
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_schedule_is_the_field_itself_bit_for_bit(inputs, one, tmp_path, way):
    fields = FIELDS | ({"hidden_weight": 0.75} if way == "hidden" else {})
    changes = {**WAYS[way], "training.steps": 2, "training.eval_interval": 2, "optimizer.warmup_steps": 0}
    stated = {f"distillation.{name}": value for name, value in fields.items()}
    schedules = {name: f"constant 0:{value}" for name, value in fields.items()}
    one.run(train, inputs, tmp_path / "fields", 1, 1, None, changes | stated)
    one.run(train, inputs, tmp_path / "schedules", 1, 1, None, changes | {"distillation.schedules": schedules})
    expected = [line | (fields if line["kind"] == "train" else {}) for line in metrics(tmp_path / "fields")]
    assert metrics(tmp_path / "schedules") == expected


def test_every_step_has_its_own_values(inputs, one, tmp_path):
    """The first step of a schedule and of its value there are the same; the second steps differ."""
    changes = {"training.steps": 2, "training.eval_interval": 2, "optimizer.warmup_steps": 0}
    schedule = {"distillation.schedules": {"temperature": "linear 1:4 2:1"}}
    one.run(train, inputs, tmp_path / "schedule", 1, 1, None, changes | schedule)
    one.run(train, inputs, tmp_path / "field", 1, 1, None, changes | {"distillation.temperature": 4.0})
    steps, same = ([x for x in metrics(tmp_path / name) if x["kind"] == "train"] for name in ("schedule", "field"))
    assert [step["temperature"] for step in steps] == [4.0, 1.0]
    assert steps[0]["kd_loss"] == same[0]["kd_loss"] and steps[1]["kd_loss"] != same[1]["kd_loss"]

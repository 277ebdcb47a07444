"""Values of schedules at single steps, and texts that are none."""

import math
import re

import pytest

from distill_nemo.config import DistillationConfig
from distill_nemo.schedules import parse_schedule


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("linear 0:4 2000:1", {0: 4.0, 1: 3.9985, 1000: 2.5, 2000: 1.0, 10**9: 1.0}),
        ("linear 10:0 20:1 40:0.5", {1: 0.0, 10: 0.0, 13: 0.3, 20: 1.0, 24: 0.9, 41: 0.5}),
        ("cosine 0:4 3:1", {0: 4.0, 1: 3.25, 2: 1.75, 3: 1.0}),  # 1 + 3 (1 + cos(60)) / 2
        ("cosine 4:0 8:1 12:0", {3: 0.0, 6: 0.5, 7: (2 + math.sqrt(2)) / 4, 10: 0.5}),
        ("constant 1:2 5:1e-1", {0: 2.0, 4: 2.0, 5: 0.1, 6: 0.1}),
        ("constant 1:.5", {1: 0.5, 9: 0.5}),
    ],
)
def test_the_value_of_a_step(text, values):
    schedule = parse_schedule("weight", text)
    assert {step: schedule.at(step) for step in values} == pytest.approx(values, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text is no shape. Known: linear, cosine, constant"),
        ("cosin 0:1", "cosin is no shape. Did you mean cosine"),
        ("linear", "has no points; write a shape and points"),
        ("linear 0", '"0" is not a point step:value'),
        ("linear 0:4 -> 5:1", '"->" is not a point step:value'),
        ("linear 0:4, 5:1", '"0:4," is not a point step:value'),
        ("linear 0.5:1", '"0.5:1" is not a point step:value'),
        ("linear -1:1", '"-1:1" is not a point step:value'),
        ("linear 0:nan", '"0:nan" is not a point step:value'),
        ("linear 0:1e999", '"0:1e999" is not a point step:value'),
        ("linear 0:1-1", '"0:1-1" is not a point step:value'),
        ("linear 5:1 5:2", "step 5 comes after step 5; order the points"),
        ("linear 5:1 3:2", "step 3 comes after step 5; order the points"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_schedule('distillation.schedules["temperature"]', text)


def test_the_losses_of_a_step_have_its_values():
    losses = DistillationConfig(schedules={"temperature": "linear 0:4 4:2", "lm_weight": "constant 0:0 3:0.5"})
    now = losses.at(2)
    assert (now.temperature, now.lm_weight, now.logits_weight, now.schedules) == (3.0, 0.0, 1.0, {})
    assert losses.uses_lm_loss and not now.uses_lm_loss

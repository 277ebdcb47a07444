"""Both balancers checked by hand: values, and the weight of each loss in the gradient."""

import math

import modelopt.torch.distill as mtd
import pytest
import torch
from torch import Tensor

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer, WeightedLossBalancer

STUDENT, LOGITS, COSINE, MSE = "student_loss", "LogitsKLLoss_0", "HiddenStateCosineLoss_1", "HiddenStateMSELoss_2"


def balance(balancer: torch.nn.Module, **values: float) -> tuple[float, dict[str, float]]:
    """Return the total, and d total / d loss of every loss."""
    losses = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    before = dict(losses)
    total = balancer(losses)
    assert total.shape == ()
    assert list(losses.items()) == list(before.items()), "the caller's dict is left as it is"
    total.backward()
    weights = {name: 0.0 if x.grad is None else x.grad.item() for name, x in losses.items()}
    return total.item(), weights


def test_balancers_and_keys_are_those_of_modelopt() -> None:
    assert mtd.loss_balancers.STUDENT_LOSS_KEY == STUDENT
    assert isinstance(LogitsAndIntermediatesLossBalancer(), mtd.DistillationLossBalancer)
    assert isinstance(WeightedLossBalancer(1.0, 1.0, 1.0), mtd.DistillationLossBalancer)


def test_three_losses_are_scaled_to_each_other() -> None:
    """Scale the intermediate mean 0.5 to logits 1: x2. Scale their sum 2 to the student's 3: x1.5, halved: x0.75."""
    losses = {STUDENT: 3.0, LOGITS: 1.0, COSINE: 0.25, MSE: 0.75}
    total, weights = balance(LogitsAndIntermediatesLossBalancer(kd_loss_scale=0.5), **losses)
    assert total == pytest.approx(3.0 + 0.5 * 3.0)
    assert weights == pytest.approx({STUDENT: 1.0, LOGITS: 0.75, COSINE: 0.75, MSE: 0.75})


@pytest.mark.parametrize("losses", [{STUDENT: 3.0}, {}], ids=["skipped", "missing"])
def test_without_the_student_loss_nothing_is_scaled_to_it(losses: dict[str, float]) -> None:
    balancer = LogitsAndIntermediatesLossBalancer(kd_loss_scale=0.5, skip_original_loss=bool(losses))
    total, weights = balance(balancer, **losses, **{LOGITS: 1.0, COSINE: 0.25})
    assert total == pytest.approx(2.0)
    assert weights == pytest.approx({name: 0.0 for name in losses} | {LOGITS: 1.0, COSINE: 4.0})


@pytest.mark.parametrize(
    ("losses", "expected", "expected_weights"),
    [
        ({STUDENT: 3.0, LOGITS: 1.0}, 6.0, {STUDENT: 1.0, LOGITS: 3.0}),
        ({STUDENT: 3.0, COSINE: 1.0}, 6.0, {STUDENT: 1.0, COSINE: 3.0}),
        ({STUDENT: 3.0, LOGITS: 1.0, COSINE: 0.0}, 6.0, {STUDENT: 1.0, LOGITS: 3.0, COSINE: 30.0}),
        ({STUDENT: 3.0, LOGITS: 0.0, COSINE: 1.0}, 3.0, {STUDENT: 1.0, LOGITS: 10.0, COSINE: 0.0}),
        ({STUDENT: 3.0, LOGITS: 0.0, COSINE: 0.0}, 3.0, {STUDENT: 1.0, LOGITS: 10.0, COSINE: 100.0}),
        ({STUDENT: 0.0, LOGITS: 1.0, COSINE: 1.0}, 0.0, {STUDENT: 1.0, LOGITS: 0.0, COSINE: 0.0}),
        ({STUDENT: 0.0, LOGITS: 0.0, COSINE: 0.0}, 0.0, {STUDENT: 1.0, LOGITS: 10.0, COSINE: 100.0}),
        ({STUDENT: 3.0, LOGITS: -1e-8}, 3.0, {STUDENT: 1.0, LOGITS: 10.0}),  # a KL of zero, rounded
        ({STUDENT: 3.0, LOGITS: -0.01}, 2.9, {STUDENT: 1.0, LOGITS: 10.0}),  # an estimate from draws
        ({STUDENT: 3.0}, 3.0, {STUDENT: 1.0}),
    ],
)
def test_losses_that_are_zero_or_missing_are_balanced(
    losses: dict[str, float], expected: float, expected_weights: dict[str, float]
) -> None:
    total, weights = balance(LogitsAndIntermediatesLossBalancer(), **losses)
    assert total == pytest.approx(expected)
    assert weights == pytest.approx(expected_weights)


def test_gradient_upstream_of_a_zero_term_is_finite() -> None:
    """Differentiate through the losses, not only with respect to them: where() and division make NaN of 0 * inf."""
    x = torch.zeros(3, requires_grad=True)
    losses = {STUDENT: x.sum() + 2.0, LOGITS: x.square().sum(), COSINE: x.abs().mean()}
    LogitsAndIntermediatesLossBalancer()(losses).backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0]


def test_amplification_is_limited() -> None:
    losses = {STUDENT: 2.0, LOGITS: 1e-4}
    total, weights = balance(LogitsAndIntermediatesLossBalancer(), **losses)
    assert total == pytest.approx(2.0 + 1e-3) and weights[LOGITS] == pytest.approx(10.0)
    _, weights = balance(LogitsAndIntermediatesLossBalancer(max_amplification=3.0), **losses)
    assert weights[LOGITS] == pytest.approx(3.0)
    _, weights = balance(LogitsAndIntermediatesLossBalancer(skip_original_loss=True), **{LOGITS: 1.0, COSINE: 1e-40})
    assert weights[COSINE] == pytest.approx(10.0)


def test_a_loss_that_a_step_lacks_keeps_its_last_mean() -> None:
    """A batch of plain corpora alone has no tokens with stored targets, and says nothing about their loss."""
    balancer = LogitsAndIntermediatesLossBalancer(kd_loss_scale=0.5)
    balancer.observe({"lm_loss": 3.0, "valid_tokens": 64.0})
    assert balancer.weights() == (1.0, 0.5, 0.5)  # nothing is known yet: as if it were as large as the student's
    balancer.observe({"lm_loss": 3.0, "logit_loss": 1.5})
    balancer.observe({"lm_loss": 6.0})
    assert balancer.weights() == (1.0, 2.0, 2.0)
    assert balancer.observed == {"lm_loss": 6.0, "logit_loss": 1.5}


def test_nan_is_not_hidden() -> None:
    for name in (STUDENT, LOGITS, COSINE):
        losses = {STUDENT: 2.0, LOGITS: 1.0, COSINE: 1.0} | {name: math.nan}
        for balancer in (LogitsAndIntermediatesLossBalancer(), WeightedLossBalancer(1.0, 1.0, 1.0)):
            assert math.isnan(balance(balancer, **losses)[0])


def test_the_weighted_balancer_is_linear() -> None:
    losses = {STUDENT: 3.0, LOGITS: 1.0, COSINE: 0.25, MSE: 0.75}
    total, weights = balance(WeightedLossBalancer(0.5, 2.0, 4.0), **losses)
    assert total == pytest.approx(0.5 * 3.0 + 2.0 * 1.0 + 4.0 * 0.5)
    assert weights == pytest.approx({STUDENT: 0.5, LOGITS: 2.0, COSINE: 2.0, MSE: 2.0})
    total, weights = balance(WeightedLossBalancer(0.0, 1.0, 0.0), **losses)
    assert total == 1.0 and weights == {STUDENT: 0.0, LOGITS: 1.0, COSINE: 0.0, MSE: 0.0}
    assert balance(WeightedLossBalancer(1.0, 2.0, 3.0), **{LOGITS: 1.5})[0] == 3.0


def test_student_loss_may_come_with_a_reduction() -> None:
    balancer = WeightedLossBalancer(1.0, 1.0, 1.0)
    balancer.set_student_loss_reduction_fn(Tensor.mean)
    assert balancer({STUDENT: torch.tensor([1.0, 3.0])}).item() == 2.0


def test_bad_input_is_refused() -> None:
    for balancer in (LogitsAndIntermediatesLossBalancer(), WeightedLossBalancer(1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r'"LogitsKLLoss_0" has shape \[2\]'):
            balancer({LOGITS: torch.ones(2)})
    with pytest.raises(ValueError, match="hidden_weight must not be negative, got -1"):
        WeightedLossBalancer(1.0, 1.0, -1.0)
    with pytest.raises(ValueError, match="all zero"):
        WeightedLossBalancer(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="max_amplification must be positive"):
        LogitsAndIntermediatesLossBalancer(max_amplification=0.0)
    with pytest.raises(ValueError, match="kd_loss_scale must not be negative"):
        LogitsAndIntermediatesLossBalancer(kd_loss_scale=-1.0)

"""Losses on one rank against fp64. `test_divergences.py` has the tests that all divergences share."""

import typing

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill_nemo.config import DistillationConfig
from distill_nemo.losses.cross_entropy import vocab_parallel_cross_entropy
from distill_nemo.losses.divergences import DIVERGENCES
from distill_nemo.losses.hidden import HiddenStateCosineLoss, HiddenStateMSELoss
from distill_nemo.losses.logits import LogitsKLLoss
from distill_nemo.losses.metrics import vocab_parallel_entropy, vocab_parallel_top1_agreement
from tests import reference

S, B, V, PADDED = 5, 3, 507, 512


def make_logits(seed: int = 0, width: int = V, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(S, B, width, generator=generator) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def error(x: Tensor | None, oracle: np.ndarray) -> float:
    assert x is not None
    return float(np.abs(x.detach().double().numpy() - oracle).max())


def test_temperature_squared_keeps_the_gradient_of_a_hot_loss() -> None:
    """The limit of T^2 dKL/dz for large T is (z - mean z - t + mean t) / V, which does not depend on T."""
    student, teacher = make_logits()
    LogitsKLLoss(temperature=1000.0)(student, teacher).sum().backward()
    centred = [x.detach() - x.detach().mean(-1, keepdim=True) for x in (student, teacher)]
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / V, atol=2e-3 / V * 20, rtol=0.05)
    scaled, plain = (
        LogitsKLLoss(temperature=3.0, scale_by_temperature_squared=x)(student, teacher) for x in (True, False)
    )
    torch.testing.assert_close(scaled, 9 * plain)


def test_vocabularies_that_differ_in_padding_only_are_aligned() -> None:
    student, teacher = make_logits(4, PADDED)
    loss = LogitsKLLoss(true_vocab_size=V)(student[..., :508], teacher)
    value, _ = reference.forward_kl(student.detach()[..., :V].double().numpy(), teacher[..., :V].double().numpy())
    assert error(loss, value.T) < 1e-4


@pytest.mark.parametrize(
    ("true_vocab_size", "student_width", "message"),
    [(None, 508, "508 .*512.*set true_vocab_size"), (510, 508, "508 .*512.*has 510")],
)
def test_other_vocabularies_are_refused(true_vocab_size: int | None, student_width: int, message: str) -> None:
    student, teacher = make_logits(4, PADDED)
    with pytest.raises(ValueError, match=message):
        LogitsKLLoss(true_vocab_size=true_vocab_size)(student[..., :student_width], teacher)


def test_logits_of_other_tokens_are_refused() -> None:
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=r"student logits are \[5, 3, .*teacher logits \[1, 3, .*tokens differ"):
        LogitsKLLoss()(student, teacher[:1])


def test_config_and_table_name_the_same_divergences() -> None:
    choices = typing.get_args(typing.get_type_hints(DistillationConfig)["divergence"])
    assert sorted(DIVERGENCES) == sorted(choices)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0, -1000.0, 1e5])
def test_an_offset_costs_entropy_and_cross_entropy_no_digit(offset: float) -> None:
    logits = make_logits(5)[1] + offset
    labels = torch.arange(S * B).view(S, B)
    expected = nn.functional.cross_entropy(logits.double().movedim(-1, 1), labels, reduction="none").numpy()
    assert error(vocab_parallel_entropy(logits), reference.entropy(logits.double().numpy())) < 3e-6
    assert error(vocab_parallel_cross_entropy(logits, labels), expected) < 1e-6 * expected.max()


def test_entropy_and_agreement() -> None:
    student, teacher = make_logits(5)
    assert error(vocab_parallel_entropy(teacher), reference.entropy(teacher.double().numpy())) < 1e-5
    student = student.detach()
    student[:2] = teacher[:2] + 3.0
    teacher[3, 0, [17, 400]] = student[3, 0, [17, 300]] = 99.0  # ties: the lowest index on both sides
    expected = student.numpy().argmax(-1) == teacher.numpy().argmax(-1)
    agreement = vocab_parallel_top1_agreement(student, teacher)
    assert agreement.tolist() == expected.astype(float).tolist()
    assert agreement[:2].min() == 1 and agreement.min() == 0 and agreement[3, 0] == 1


@pytest.mark.parametrize(
    ("loss_class", "oracle"), [(HiddenStateCosineLoss, reference.cosine), (HiddenStateMSELoss, reference.mse)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_losses_equal_their_oracles(loss_class: type, oracle, dtype: torch.dtype) -> None:
    student, teacher = make_logits(6, width=64, dtype=dtype)
    loss = loss_class(64, 64)((student, None), teacher)
    loss.sum().backward()
    value, gradient = oracle(student.detach().double().numpy(), teacher.double().numpy())
    assert loss.dtype == torch.float32 and loss.shape == (B, S) and student.grad is not None
    assert error(loss, value.T) < 1e-5 * value.max()
    resolution = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert error(student.grad, gradient) < resolution * np.abs(gradient).max()
    torch.testing.assert_close(loss_class(64, 64)(teacher, teacher), torch.zeros(B, S), atol=5e-7, rtol=0)


def test_states_of_another_width_are_projected() -> None:
    torch.manual_seed(0)
    loss_module = HiddenStateMSELoss(48, 64)
    torch.manual_seed(0)
    weight = nn.Linear(48, 64, bias=False).weight.detach()
    student, (_, teacher) = make_logits(7, 48)[0], make_logits(8, 64)
    loss = loss_module(student, teacher)
    loss.sum().backward()
    assert loss_module.projection is not None and loss_module.projection.weight.grad is not None
    assert torch.equal(loss_module.projection.weight, weight)
    assert getattr(loss_module.projection.weight, "sequence_parallel", None) is False
    hidden, matrix = student.detach().double().numpy(), weight.double().numpy()
    value, gradient = reference.mse(hidden @ matrix.T, teacher.double().numpy())
    assert error(loss, value.T) < 1e-5 * value.max()
    expected = gradient.reshape(-1, 64).T @ hidden.reshape(-1, 48)
    assert error(loss_module.projection.weight.grad, expected) < 1e-5 * np.abs(expected).max()
    assert HiddenStateMSELoss(64, 64).projection is None

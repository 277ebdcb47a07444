"""Top-k forward KL: ties, tiny and empty tails, and agreement with full forward KL."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_nemo.losses.divergences import choose_divergence
from tests import reference
from tests.unit.losses.test_losses import PADDED, B, S, V, error, make_logits

pytestmark = pytest.mark.usefixtures("kernels")


def top_k_loss(top_k: int, student: Tensor, teacher: Tensor) -> Tensor:
    return choose_divergence("forward_kl", top_k=top_k)(student, teacher)


def differentiate(student: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def oracle(student: Tensor, teacher: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    return reference.top_k_forward_kl(student.detach().double().numpy(), teacher.double().numpy(), top_k=top_k)


@pytest.mark.parametrize("top_k", [V, V + 3, 1000])
def test_the_whole_vocabulary_is_forward_kl(top_k: int) -> None:
    """This also holds if top_k reaches into padding, which is -inf on both sides."""
    student, teacher = make_logits(width=PADDED)
    with torch.no_grad():
        student[..., V:] = teacher[..., V:] = -torch.inf
    loss, gradient = differentiate(student, top_k_loss(top_k, student, teacher))
    expected = differentiate(student, choose_divergence("forward_kl")(student, teacher))
    torch.testing.assert_close(loss, expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(gradient, expected[1], atol=1e-6, rtol=0)


def test_more_tokens_bring_it_closer_to_forward_kl_from_below() -> None:
    student, teacher = make_logits(1)
    losses = torch.stack([top_k_loss(k, student, teacher).detach() for k in (1, 5, 20, 100, V)])
    assert (losses.diff(dim=0) > -1e-5).all()
    assert losses[0].mean() < 0.8 * losses[-1].mean()


def test_equal_to_forward_kl_where_the_tails_have_the_same_shape() -> None:
    _, teacher = make_logits(2)
    top = teacher.topk(7).indices
    student = (teacher + 2.0).scatter(-1, top, torch.randn(S, B, 7)).requires_grad_()
    loss, gradient = differentiate(student, top_k_loss(7, student, teacher))
    expected = differentiate(student, choose_divergence("forward_kl")(student, teacher))
    torch.testing.assert_close(loss, expected[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(gradient, expected[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_column(top_k: int, dtype: torch.dtype) -> None:
    student, teacher = make_logits(3)
    teacher = (teacher / 2).round().to(dtype)  # about 15 levels, 0.0 and -0.0 among them
    assert teacher.signbit().logical_and(teacher == 0).any() and (teacher == teacher.amax(-1, True)).sum() > 2 * S * B
    loss, gradient = differentiate(student, top_k_loss(top_k, student, teacher))
    value, slope = oracle(student, teacher, top_k)
    assert error(loss, value) < 1e-5 * value.max()
    assert error(gradient, slope) < 3e-6


@pytest.mark.parametrize("peak", [30.0, 80.0])
def test_a_student_with_next_to_no_tail(peak: float) -> None:
    """The tail's mass is 1e-11 or 1e-32. Computed as 1 minus the others it would be 0, and the loss infinite."""
    student, teacher = make_logits(4)
    teacher /= 4  # so that most of its mass is in the tail
    with torch.no_grad():
        student.div_(4).scatter_(-1, teacher.topk(5).indices, peak)
    loss, gradient = differentiate(student, top_k_loss(5, student, teacher))
    value, slope = oracle(student, teacher, 5)
    assert value.min() > 0.5 * peak
    assert error(loss, value) < 1e-6 * peak
    assert error(gradient, slope) < 3e-6


@pytest.mark.parametrize("top_k", [10, 20])
def test_a_teacher_without_a_tail(top_k: int) -> None:
    """The teacher has 10 tokens and is -inf elsewhere: forward KL again, and the student's tail has gradient q."""
    student, teacher = make_logits(5)
    teacher = teacher.scatter(-1, teacher.topk(V - 10, largest=False).indices, -torch.inf)
    loss, gradient = differentiate(student, top_k_loss(top_k, student, teacher))
    expected = differentiate(student, choose_divergence("forward_kl")(student, teacher))
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, expected[1], atol=1e-6, rtol=0)
    outside = teacher == -torch.inf
    torch.testing.assert_close(gradient[outside], student.softmax(-1)[outside], atol=1e-6, rtol=1e-5)

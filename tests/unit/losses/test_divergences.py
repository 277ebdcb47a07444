"""Value and gradient of every divergence on one rank, with all kernels, against fp64. See also `test_top_k.py`."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill_nemo.losses.divergences import DIVERGENCES
from distill_nemo.losses.divergences.forward_kl import ForwardKL
from distill_nemo.losses.divergences.jensen_shannon import JensenShannon
from distill_nemo.losses.divergences.reverse_kl import ReverseKL
from distill_nemo.losses.kernels import eager as eager_code
from distill_nemo.losses.logits import LogitsKLLoss
from tests import reference
from tests.unit.losses.test_losses import PADDED, B, S, V, error, make_logits

pytestmark = pytest.mark.usefixtures("kernels")
every_divergence = pytest.mark.parametrize("name", reference.DIVERGENCES)
CHUNKS = (1, 2 * B * V, eager_code.CHUNK)  # of torch's kernels, some of which C replaces


def loss_and_oracle(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0):
    """Return ([B, S] of LogitsKLLoss without T^2, not yet differentiated; expected value and gradient)."""
    arguments, oracle, *_ = reference.DIVERGENCES[name]
    loss = LogitsKLLoss(temperature=temperature, scale_by_temperature_squared=False, **arguments)(student, teacher)
    return loss, *oracle(student.detach().double().numpy(), teacher.double().numpy(), temperature)


@every_divergence
def test_oracle_gradient_is_the_slope_of_its_value(name: str) -> None:
    student, teacher = (x.detach().double().numpy()[0] for x in make_logits(width=40))
    oracle = reference.DIVERGENCES[name][1]
    _, gradient = oracle(student, teacher, 2.0)
    slope = np.empty_like(gradient)
    for j in range(40):
        step = 1e-5 * (np.arange(40) == j)
        slope[:, j] = (oracle(student + step, teacher, 2.0)[0] - oracle(student - step, teacher, 2.0)[0]) / 2e-5
    assert np.abs(gradient).max() > 0.01
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-9)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(
    ("kernels", "chunk"),
    [*(("c", chunk) for chunk in CHUNKS), *(("eager", chunk) for chunk in CHUNKS), ("triton", 1)],
    indirect=["kernels"],
)
def test_value_and_gradient(monkeypatch: pytest.MonkeyPatch, name: str, temperature: float, chunk: int) -> None:
    monkeypatch.setattr(eager_code, "CHUNK", chunk)
    if chunk == 1:
        monkeypatch.setattr("distill_nemo.losses.kernels.triton_kernels.BLOCK", 128)
        monkeypatch.setattr("distill_nemo.losses.kernels.triton_kernels.LANES", 32)
    student, teacher = make_logits()
    teacher.requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    weights = torch.rand(B, S)
    loss, value, gradient = loss_and_oracle(name, student, teacher.detach(), temperature)
    (loss * weights).sum().backward()
    assert loss.dtype == torch.float32 and loss.shape == (B, S)
    assert error(loss, value.T) < 1e-5 * max(1.0, value.max())
    tolerance = 4e-7 / temperature + 3e-6 * np.abs(gradient).max()
    assert error(student.grad, gradient * weights.T.double().numpy()[..., None]) < tolerance
    assert teacher.grad is None
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher.detach(), before[1])


@every_divergence
def test_zero_for_equal_logits_and_never_negative(name: str) -> None:
    module = LogitsKLLoss(**reference.DIVERGENCES[name][0])
    _, teacher = make_logits()
    equal = teacher.clone().requires_grad_()
    loss = module(equal, teacher)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(B, S)) and error(equal.grad, np.zeros(1)) < 1e-6
    student = teacher + 1e-3 * torch.randn_like(teacher)
    assert module(student, teacher).min() > -3e-6  # of a value around 5e-7, from terms around 10
    assert module(*make_logits(1)).min() > 0


@every_divergence
def test_a_shift_changes_nothing_and_the_gradient_sums_to_zero(name: str) -> None:
    module = LogitsKLLoss(**reference.DIVERGENCES[name][0])
    student, teacher = make_logits()
    loss = module(student, teacher)
    torch.testing.assert_close(module(student + 30.0, teacher - 20.0), loss, atol=5e-5, rtol=0)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0.005
    assert student.grad.sum(-1).abs().max() < 4e-6 * max(1.0, float(student.grad.abs().max()))


OFFSETS = [(30, 30), (100, 100), (1000, 1000), (-100, -100), (1000, 0), (0, -1000), (30, -70), (1e5, -1e5)]


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_offset_of_all_logits_costs_no_digit(name: str, temperature: float) -> None:
    """Offsets differ between student and teacher and between tokens. fp64 gets the logits as fp32 rounds them."""
    for offsets in OFFSETS:
        (student, teacher), by_token = make_logits(), torch.linspace(1, 2, S * B).view(S, B, 1)
        with torch.no_grad():
            for x, offset in zip((student, teacher), offsets, strict=True):
                x.add_(offset * by_token)
        loss, value, gradient = loss_and_oracle(name, student, teacher, temperature)
        loss.sum().backward()
        assert error(loss, value.T) < 1e-6 * max(1.0, value.max()), offsets
        assert error(student.grad, gradient) < 3e-7 + 3e-6 * np.abs(gradient).max(), offsets


@every_divergence
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("c", torch.bfloat16),
        ("c", torch.float16),
        ("eager", torch.bfloat16),
        ("eager", torch.float16),
        ("triton", torch.float16),  # its interpreter truncates to bf16, where a GPU rounds
    ],
    indirect=["kernels"],
)
def test_low_precision_is_as_exact_as_fp32_eager(name: str, dtype: torch.dtype) -> None:
    """The reference is the formula in fp32 on logits of that precision, which is stricter than the formula in it."""
    student, teacher = make_logits(2, dtype=dtype)
    loss, value, gradient = loss_and_oracle(name, student, teacher)
    loss.sum().backward()
    pair = (x.detach().float().numpy() for x in (student, teacher))
    in_fp32, gradient_in_fp32 = (torch.from_numpy(x) for x in reference.DIVERGENCES[name].oracle(*pair))
    assert in_fp32.dtype == torch.float32 and student.grad is not None and student.grad.dtype == dtype
    assert error(in_fp32, value) < 1e-3
    assert error(loss, value.T) <= error(in_fp32, value) + 1e-5
    assert error(student.grad, gradient) <= error(gradient_in_fp32.to(dtype), gradient) + 1e-6


@every_divergence
@pytest.mark.parametrize("true_vocab_size", [V, None], ids=["garbage", "minus infinity"])
def test_padding_takes_no_probability(name: str, true_vocab_size: int | None) -> None:
    """Padding is cut off by true_vocab_size, or already -inf on both sides."""
    arguments, oracle, *_ = reference.DIVERGENCES[name]
    student, teacher = make_logits(3, PADDED)
    with torch.no_grad():
        for x in (student, teacher):
            x[..., V:] = 50.0 if true_vocab_size else -torch.inf
    loss = LogitsKLLoss(true_vocab_size=true_vocab_size, **arguments)((student, None), (teacher, None))
    loss.sum().backward()
    value, gradient = oracle(student.detach()[..., :V].double().numpy(), teacher[..., :V].double().numpy())
    assert loss.shape == (B, S) and student.grad is not None
    assert error(loss, value.T) < 1e-5 * max(1.0, value.max())
    assert error(student.grad[..., :V], gradient) < 4e-7 + 3e-6 * np.abs(gradient).max()
    assert torch.equal(student.grad[..., V:], torch.zeros(S, B, PADDED - V))


@every_divergence
def test_masked_tokens_have_no_gradient(name: str) -> None:
    student, teacher = make_logits()
    (LogitsKLLoss(**reference.DIVERGENCES[name][0])(student, teacher) * torch.zeros(B, S)).sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


@every_divergence
def test_masked_tokens_have_no_gradient_even_where_logits_are_nan(name: str) -> None:
    student, teacher = make_logits()
    with torch.no_grad():
        student[0, 0, 7] = torch.nan
        teacher[1, 2] = torch.nan
        student[2, 1, 3] = torch.inf
    weights = torch.ones(B, S)
    weights[[0, 2, 1], [0, 1, 2]] = 0.0
    loss = LogitsKLLoss(**reference.DIVERGENCES[name][0])(student, teacher)
    torch.where(weights > 0, loss, 0.0).sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
    live = student.grad.abs().sum(-1) > 0
    assert torch.equal(live, weights.T > 0)


@every_divergence
def test_nan_logits_are_not_hidden(name: str) -> None:
    student, teacher = make_logits()
    with torch.no_grad():
        student[0, 0, 7] = torch.nan
        teacher[1, 2, 7] = torch.nan
    loss = LogitsKLLoss(**reference.DIVERGENCES[name][0])(student, teacher)
    assert loss.isnan().nonzero().tolist() == [[0, 0], [2, 1]]


class WideTensors(TorchDispatchMode):
    """Record the most elements of any tensor whose dtype is wider than 16 bits."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.element_size() > 2:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("name", [name for name in reference.DIVERGENCES if name != "top 300"])
def test_no_fp32_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(eager_code, "CHUNK", B * V)
    student, teacher = make_logits(dtype=torch.bfloat16)
    with WideTensors() as wide:
        LogitsKLLoss(**reference.DIVERGENCES[name][0])(student, teacher).sum().backward()
    assert student.grad is not None and wide.largest <= B * V


@every_divergence
def test_what_is_saved_for_backward(name: str) -> None:
    """Saved are the logits (the teacher's only without top-k) and a few numbers per token."""
    expected = reference.DIVERGENCES[name]
    arguments = expected.arguments
    student, teacher = make_logits()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        LogitsKLLoss(scale_by_temperature_squared=False, **arguments)(student, teacher)
    inputs = {x.data_ptr() for x in (student, teacher)}
    assert {x.data_ptr() for x in saved} & inputs == ({student.data_ptr()} if "top_k" in arguments else inputs)
    num_bytes = sum(x.numel() * x.element_size() for x in saved if x.data_ptr() not in inputs)
    numbers = 3 + 2 * arguments["top_k"] if "top_k" in arguments else expected.num_saved
    assert num_bytes == S * B * 4 * numbers


def test_jensen_shannon_tends_to_forward_and_reverse_kl() -> None:
    """Divided by beta as beta -> 0, and by 1 - beta as beta -> 1, its values and gradients are those of the KLs."""
    small = 1e-4
    student, teacher = (0.3 * x.detach() for x in make_logits(5))
    student.requires_grad_()
    for beta, limit in [(small, ForwardKL()), (1 - small, ReverseKL())]:
        scaled, expected = JensenShannon(beta=beta)(student, teacher) / small, limit(student, teacher)
        torch.testing.assert_close(scaled, expected, rtol=0.01, atol=0)
        got, want = (torch.autograd.grad(x.sum(), student)[0] for x in (scaled, expected))
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
    assert not torch.allclose(ForwardKL()(student, teacher), expected, rtol=0.1)


def test_jensen_shannon_is_bounded_and_symmetric_at_one_half() -> None:
    student, teacher = (x.detach() for x in make_logits())
    torch.testing.assert_close(JensenShannon()(student, teacher), JensenShannon()(teacher, student))
    apart = torch.tensor([[[90.0, -90.0, -torch.inf]]]).requires_grad_()
    disjoint = torch.tensor([[[-torch.inf, -torch.inf, 3.0]]])
    for beta in (0.5, 0.1):
        loss = JensenShannon(beta=beta)(apart, disjoint)
        assert loss.item() == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), apart)
        assert gradient.abs().max() < 1e-6  # flat, and not nan


@pytest.mark.parametrize("width", [300, 2048])
def test_weights_that_underflow_count_for_nothing_even_beside_no_probability_at_all(width: int) -> None:
    peaked, flat = torch.full((1, 1, width), -200.0), torch.zeros(1, 1, width)
    peaked[..., 0], flat[..., 5] = 0.0, -torch.inf
    for name, (student, teacher) in {"forward_kl": (flat, peaked), "reverse_kl": (peaked, flat)}.items():
        student = student.clone().requires_grad_()
        loss = DIVERGENCES[name]()(student, teacher)
        assert loss.item() == pytest.approx(math.log(width - 1), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isfinite().all() and gradient[..., 5].item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "kl"}, f'"kl" is not known; choose one of: {", ".join(DIVERGENCES)}'),
        ({"divergence": "jensen_shannon", "beta": 0.0}, "beta must lie between 0 and 1, both excluded, got 0.0"),
        ({"divergence": "jensen_shannon", "beta": 1.0}, "got 1.0: use forward_kl or reverse_kl"),
        ({"divergence": "jensen_shannon", "beta": math.nan}, "got nan"),
        ({"divergence": "reverse_kl", "top_k": 5}, 'top_k goes with divergence "forward_kl" only, got "reverse_kl"'),
        ({"divergence": "jensen_shannon", "top_k": 5}, 'got "jensen_shannon"; leave top_k at None'),
        ({"top_k": 0}, "top_k must be an int of at least 1, or None for the whole vocabulary, got 0"),
        ({"top_k": 2.5}, "got 2.5"),
        ({"top_k": True}, "got True"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitsKLLoss(**arguments)

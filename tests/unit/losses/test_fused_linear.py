"""Fused linear losses on one rank against fp64: values, gradients of hidden states, weight and bias."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_nemo.losses.divergences import choose_divergence
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from tests import reference

N, H, TEACHER_H, V, PADDED = 23, 24, 40, 507, 512
GRADIENTS = "hidden", "weight", "bias"


def make_heads(dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> tuple[Head, Head]:
    """Return student (leaves) and teacher of another width, with logits of about 2 and padding that has logits."""
    generator = torch.Generator().manual_seed(seed)

    def head(width: int) -> Head:
        shapes = (N, width), (PADDED, width), (PADDED,)
        hidden, weight, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        return Head(hidden, weight.mul_(2 / width**0.5), b if bias else None)

    student = head(H)
    return as_leaves(student), head(TEACHER_H)


def as_leaves(head: Head) -> Head:
    for x in head[:3]:
        if x is not None:
            x.requires_grad_()
    return head


def make_targets(masked: str = "some") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(V, (N,), generator=generator)
    mask = torch.rand(N, generator=generator)
    return labels, {"none": torch.ones(N), "some": mask * (mask > 0.4), "all": torch.zeros(N)}[masked]


def of(name: str, group: Any = None, temperature: float = 1.0, **changes: Any) -> FusedLoss:
    """Return the fused loss for a name in `reference.DIVERGENCES`."""
    arguments = {"name" if k == "divergence" else k: v for k, v in reference.DIVERGENCES[name][0].items()}
    divergence = choose_divergence(**{"name": "forward_kl"} | arguments, temperature=temperature)
    settings: dict[str, Any] = {"num_true": V, "chunk_tokens": 5, "group": group}
    return FusedLoss(divergence, **settings | changes)


def oracle(
    name: str, student: Head, teacher: Head, labels: Tensor, mask: Tensor, loss: FusedLoss, num_true: int = V
) -> dict[str, NDArray[np.float64]]:
    """Compute both sums and the gradients of the weighted total in fp64."""

    def numpy(x: Tensor | None) -> NDArray[np.float64]:
        return np.zeros(PADDED) if x is None else x.detach().double().numpy()

    (h, w, b), (g, u, c) = ([numpy(x) for x in head[:3]] for head in (student, teacher))
    z, by_product = reference.finished(h @ w[:num_true].T + b[:num_true], student.scale, student.softcap)
    t, _ = reference.finished(g @ u[:num_true].T + c[:num_true], teacher.scale, teacher.softcap)
    kd, kd_slope = (loss.factor * x for x in reference.DIVERGENCES[name][1](z, t, loss.divergence.temperature))
    target, weight = np.eye(num_true)[labels], numpy(mask)
    q = reference.softmax(z)
    lm, lm_slope = -np.log((q * target).sum(-1)), q - target
    slope = weight[:, None] * (float(loss.lm_weight) * lm_slope + float(loss.logits_weight) * kd_slope) * by_product
    padded = np.pad(slope, ((0, 0), (0, PADDED - num_true)))
    sums = {"lm": (lm * weight).sum(), "logits": (kd * weight).sum()}
    return sums | {"hidden": slope @ w[:num_true], "weight": padded.T @ h, "bias": padded.sum(0)}


def relative(found: Tensor | None, expected: NDArray[np.float64]) -> float:
    """Return the largest error relative to the largest entry."""
    assert found is not None
    return float(np.abs(found.detach().double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("masked", ["none", "some"])
@pytest.mark.parametrize(("temperature", "weights"), [(1.0, (0.0, 1.0)), (1.0, (0.3, 0.7)), (2.0, (0.3, 0.7))])
def test_values_and_gradients(name: str, masked: str, temperature: float, weights: tuple[float, float]) -> None:
    """Chunks have 5 tokens, and the upstream gradient is not 1."""
    check_values_and_gradients(name, masked, temperature, weights)


@pytest.mark.parametrize("name", [name for name in reference.DIVERGENCES if not name.startswith("top")])
@pytest.mark.parametrize("kernels", ["eager", "triton"], indirect=True)
def test_values_and_gradients_by_other_kernels_than_c(name: str, kernels: str) -> None:
    check_values_and_gradients(name, "some", 2.0, (0.3, 0.7))


def check_values_and_gradients(name: str, masked: str, temperature: float, weights: tuple[float, float]) -> None:
    student, teacher = make_heads()
    targets = make_targets(masked)
    loss = of(name, temperature=temperature, factor=temperature**2, lm_weight=weights[0], logits_weight=weights[1])
    found = fused_linear_losses(student, teacher, *targets, loss)
    expected = oracle(name, student, teacher, *targets, loss)
    assert not (found.lm.requires_grad or found.logits.requires_grad)
    assert relative(found.lm, expected["lm"]) < 1e-6 and relative(found.logits, expected["logits"]) < 1e-5
    assert found.total.item() == pytest.approx(weights[0] * found.lm.item() + weights[1] * found.logits.item())
    (found.total * -0.37).backward()
    for x, which in zip(student[:3], GRADIENTS, strict=True):
        assert relative(x.grad, -0.37 * expected[which]) < 1e-5, which
    assert student.hidden_NH.grad is not None and student.weight_vH.grad is not None
    assert student.hidden_NH.grad[targets[1] == 0].abs().sum() == 0 and student.weight_vH.grad[V:].abs().max() == 0


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_offset_of_all_logits_costs_no_digit(name: str, temperature: float) -> None:
    """Offsets are in the biases. Factors are so coarse that fp32 holds every logit exactly."""
    for offsets in ((0.0, 0.0), (100.0, 100.0), (1000.0, -1000.0)):
        student, teacher = make_heads()
        with torch.no_grad():
            for head, offset in zip((student, teacher), offsets, strict=True):
                for x in head[:3]:
                    x.copy_((x * 16).round() / 16)  # pyright: ignore
                head.bias_v.add_(offset)  # pyright: ignore
        loss = of(name, temperature=temperature, lm_weight=0.3, logits_weight=0.7)
        found = fused_linear_losses(student, teacher, *make_targets(), loss)
        expected = oracle(name, student, teacher, *make_targets(), loss)
        assert relative(found.lm, expected["lm"]) < 3e-7 and relative(found.logits, expected["logits"]) < 1e-6
        found.total.backward()
        for x, which in zip(student[:3], GRADIENTS, strict=True):
            assert relative(x.grad, expected[which]) < 2e-6, (which, offsets)


FINISHES = {  # scale and softcap of student and teacher
    "student's scale": ((0.3, None), (1.0, None)),
    "teacher's scale": ((1.0, None), (3.0, None)),
    "softcaps": ((1.0, 5.0), (1.0, 3.0)),
    "student's softcap": ((1.0, 4.0), (1.0, None)),
    "scales and softcaps": ((0.25, 4.0), (2.0, 5.0)),
}


def finished_heads(how: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Head, Head]:
    pairs = zip(make_heads(dtype, bias), FINISHES[how], strict=True)
    student, teacher = (head._replace(scale=scale, softcap=softcap) for head, (scale, softcap) in pairs)
    return student, teacher


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("how", FINISHES)
@pytest.mark.parametrize(("temperature", "lm_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_logits_are_scaled_and_capped(name: str, how: str, temperature: float, lm_weight: float) -> None:
    student, teacher = finished_heads(how)
    loss = of(name, temperature=temperature, factor=temperature**2, lm_weight=lm_weight, logits_weight=0.7, upstream=2)
    found = fused_linear_losses(student, teacher, *make_targets(), loss)
    expected = oracle(name, student, teacher, *make_targets(), loss)
    assert relative(found.lm, expected["lm"]) < 1e-6 and relative(found.logits, expected["logits"]) < 1e-5
    (found.total * 3).backward()
    for x, which in zip(student[:3], GRADIENTS, strict=True):
        assert relative(x.grad, 3 * expected[which]) < 1e-5, which
    assert student.weight_vH.grad is not None and student.weight_vH.grad[V:].abs().max() == 0  # padding


@pytest.mark.parametrize("offset", [30.0, 100.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_capped_logits_with_an_offset_are_as_exact_as_torchs(name: str, offset: float) -> None:
    """Allow a factor of 3: at 100, a softcap of 30 lets 0.5 % of a difference through, and fp32 loses two digits."""
    student, teacher = (head._replace(softcap=30.0) for head in make_heads())
    with torch.no_grad():
        for head in (student, teacher):
            head.bias_v.add_(offset)  # pyright: ignore
    targets, loss = make_targets(), of(name, lm_weight=0.3, logits_weight=0.7)
    expected = oracle(name, student, teacher, *targets, loss)
    fused_linear_losses(student, teacher, *targets, loss).total.backward()
    ours = [relative(x.grad, expected[which]) for x, which in zip(student[:3], GRADIENTS, strict=True)]
    for x in student[:3]:
        x.grad = None  # pyright: ignore
    z, t = (30 * torch.tanh((h @ w.T + b)[:, :V] / 30) for h, w, b, *_ in (student, teacher))
    lm = torch.nn.functional.cross_entropy(z, targets[0], reduction="none")
    kd = loss.divergence(z[:, None], t[:, None].detach())[:, 0]
    ((0.3 * lm + 0.7 * kd) * targets[1]).sum().backward()
    torchs = [relative(x.grad, expected[which]) for x, which in zip(student[:3], GRADIENTS, strict=True)]
    assert all(a < max(1e-5, 3 * b) for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


def test_capped_gradients_are_multiplied_before_they_are_rounded() -> None:
    student, teacher = finished_heads("softcaps", torch.bfloat16, bias=False)
    loss = of("forward_kl", lm_weight=0.3, logits_weight=0.7)
    fused_linear_losses(student, teacher, *make_targets(), loss).total.backward()
    expected = oracle("forward_kl", student, teacher, *make_targets(), loss)
    for x, which in named(student):
        assert relative(x.grad, expected[which]) < 2**-8, which


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, None])
def test_chunks_only_change_the_rounding(chunk_tokens: int | None) -> None:
    student, teacher = make_heads(bias=False)
    targets, loss = make_targets(), of("forward_kl", lm_weight=0.5, chunk_tokens=chunk_tokens)
    found = fused_linear_losses(student, teacher, *targets, loss)
    found.total.backward()
    expected = oracle("forward_kl", student, teacher, *targets, loss)
    assert relative(student.weight_vH.grad, expected["weight"]) < 1e-5
    assert relative(student.hidden_NH.grad, expected["hidden"]) < 1e-5


def test_masked_tokens_may_hold_anything_and_a_batch_may_hold_nothing_else() -> None:
    student, teacher = make_heads()
    labels, mask = make_targets()
    loss = of("forward_kl", lm_weight=1.0)
    with torch.no_grad():
        student.hidden_NH[mask == 0], teacher.hidden_NH[mask == 0] = torch.nan, torch.inf
    fused_linear_losses(student, teacher, labels, mask, loss).total.backward()
    assert all(x.grad.isfinite().all() for x in student[:3])
    for x in student[:3]:
        x.grad = None
    found = fused_linear_losses(student, teacher, labels, torch.zeros(N), loss)
    found.total.backward()
    assert [x.item() for x in found] == [0, 0, 0] and all(x.grad.abs().max() == 0 for x in student[:3])


def test_without_gradients_nothing_is_added_anywhere() -> None:
    student, teacher = make_heads()
    weight: Any = student.weight_vH
    weight.main_grad = torch.zeros(PADDED, H)
    with torch.no_grad():
        found = fused_linear_losses(student, teacher, *make_targets(), of("forward_kl"))
    assert not found.total.requires_grad and weight.main_grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_given_logits(dtype: torch.dtype) -> None:
    """The reference rounds unfused logits and their gradient to the dtype of the weights."""
    from distill_nemo.losses.logits import LogitsKLLoss

    (student, teacher), (labels, mask) = make_heads(dtype, bias=False), make_targets()
    loss = of("forward_kl", logits_weight=1.0)
    expected = oracle("forward_kl", student, teacher, labels, mask, loss)
    fused = fused_linear_losses(student, teacher, labels, mask, loss)
    fused.total.backward()
    errors = [relative(fused.logits, expected["logits"]), *(relative(x.grad, expected[n]) for x, n in named(student))]
    for x, _ in named(student):
        x.grad = None
    z, t = (head.hidden_NH[:, None] @ head.weight_vH.T for head in (student, teacher))
    unfused = (LogitsKLLoss(true_vocab_size=V)(z, t)[0] * mask).sum()
    unfused.backward()
    theirs = [relative(unfused, expected["logits"]), *(relative(x.grad, expected[n]) for x, n in named(student))]
    assert all(ours <= other for ours, other in zip(errors, theirs, strict=True)), (errors, theirs)


def named(student: Head) -> list[tuple[Tensor, str]]:
    return [(student.hidden_NH, "hidden"), (student.weight_vH, "weight")]


def test_megatrons_main_grad_is_added_to_in_fp32() -> None:
    """DDP's hook is notified, over two micro batches, with the upstream gradient that was announced."""
    student, teacher = make_heads(torch.bfloat16, bias=False)
    weight: Any = student.weight_vH
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, H), False
    loss = of("reverse_kl", lm_weight=torch.tensor(0.2), upstream=64.0)
    for _ in range(2):
        (64.0 * fused_linear_losses(student, teacher, *make_targets(), loss).total).backward()
    expected = oracle("reverse_kl", student, teacher, *make_targets(), loss)
    assert weight.grad is None and weight.grad_added_to_main_grad
    assert relative(weight.main_grad - 1, 128 * expected["weight"]) < 1e-5
    assert relative(student.hidden_NH.grad, 128 * expected["hidden"]) < 1e-2


def test_another_upstream_gradient_than_announced_is_refused_where_it_would_be_wrong() -> None:
    student, teacher = make_heads()
    weight: Any = student.weight_vH
    weight.main_grad = torch.zeros(PADDED, H)
    with pytest.raises(RuntimeError, match="is in main_grad already"):
        (2.0 * fused_linear_losses(student, teacher, *make_targets(), of("forward_kl")).total).backward()


def test_a_tied_embedding_gets_both_gradients() -> None:
    student, teacher = make_heads(bias=False)
    table, targets, loss = student.weight_vH, make_targets(), of("forward_kl", lm_weight=1.0)
    hidden = torch.nn.functional.embedding(targets[0], table)
    fused_linear_losses(Head(hidden, table), teacher, *targets, loss).total.backward()
    expected = oracle("forward_kl", Head(hidden, table), teacher, *targets, loss)
    both = expected["weight"]
    np.add.at(both, targets[0].numpy(), expected["hidden"])
    assert relative(table.grad, both) < 1e-5


def test_the_backward_of_one_side_only() -> None:
    student, teacher = make_heads()
    student.weight_vH.requires_grad_(False)
    fused_linear_losses(student, teacher, *make_targets(), of("forward_kl")).total.backward()
    assert student.weight_vH.grad is None and student.hidden_NH.grad is not None


def test_other_widths_are_refused() -> None:
    student, teacher = make_heads(bias=False)
    with pytest.raises(ValueError, match="student logits would have 512 columns on this rank, teacher logits 256"):
        fused_linear_losses(student, teacher._replace(weight_vH=teacher.weight_vH[:256]), *make_targets(), of("top 1"))

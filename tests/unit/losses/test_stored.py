"""Losses against stored targets on one rank: what a teacher stores, and values and gradients against fp64.

`tests/distributed/losses/test_stored.py` has the same with the vocabulary on several ranks.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from distill_nemo.losses.stored import STORED_LOSSES, encode
from distill_nemo.losses.stored.metrics import metrics_against_stored
from distill_nemo.losses.stored.rows import StoredRows
from tests import reference
from tests.unit.losses.test_fused_linear import GRADIENTS, PADDED, N, V, make_heads, make_targets, relative

NUM = 12
Array = NDArray[np.float64]


def numpy(x: Tensor) -> Array:
    return x.detach().double().numpy()


def logits_of(head: Head, num_true: int = V) -> Tensor:
    """Return [N, PADDED] logits with -inf in the padding."""
    return head.frozen(PADDED).part(slice(None), num_true, torch.empty(N, PADDED))


def uniforms(num: int = N, seed: int = 3) -> Tensor:
    return torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stored_of(codec: Any, teacher: Head, labels: Tensor, temperature: float, num: int = NUM) -> dict[str, Tensor]:
    return encode(codec, num, temperature, logits_of(teacher), labels, uniforms())


def dense(stored: dict[str, Tensor], what: str, width: int = V) -> Array:
    """Return a field by id, [N, width], 0 for others."""
    found = np.zeros((len(stored["ids"]), width))
    for row, (ids, values) in enumerate(zip(stored["ids"], stored[what], strict=True)):
        for i, value in zip(ids.tolist(), values.tolist(), strict=True):
            if i >= 0:
                found[row, i] += value
    return found


def oracle(
    codec: str, student: Array, teacher: Array, stored: dict[str, Tensor], temperature: float
) -> tuple[Array, Array]:
    """Return value and gradient of every token with respect to the student's logits, in fp64."""
    if codec == "top_k":
        return reference.top_k_forward_kl(student, teacher, temperature, NUM)
    return reference.sampled(student, teacher, dense(stored, "counts", teacher.shape[-1]), NUM, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_teacher_stores_its_own_numbers(temperature: float) -> None:
    _, teacher = make_heads()
    labels, _ = make_targets()
    stored = stored_of("top_k", teacher, labels, temperature)
    t = numpy(logits_of(teacher)[:, :V])
    p, p_at_1 = reference.softmax(t / temperature), reference.softmax(t)
    order = np.argsort(-t, axis=-1, kind="stable")[:, :NUM]
    assert (stored["ids"].numpy() == order).all() and (stored["top1"].numpy() == order[:, 0]).all()
    assert relative(stored["logprobs"], np.log(np.take_along_axis(p, order, -1))) < 1e-6
    assert relative(stored["tail"], np.log(1 - np.take_along_axis(p, order, -1).sum(-1))) < 1e-6
    assert relative(stored["entropy"], -(p * np.log(p)).sum(-1)) < 1e-6
    assert relative(stored["label_logprob"], np.log(p_at_1[np.arange(N), labels])) < 1e-6
    assert ("entropy_at_1" in stored) == (temperature != 1)
    if temperature != 1:
        assert relative(stored["entropy_at_1"], reference.entropy(t)) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num", [1, 12, 63])
def test_draws_are_systematic(temperature: float, num: int) -> None:
    _, teacher = make_heads()
    labels, _ = make_targets()
    stored = stored_of("sampled", teacher, labels, temperature, num)
    t, counts = numpy(logits_of(teacher)[:, :V]), dense(stored, "counts")
    expected = [
        reference.systematic_counts(x, temperature, num, u) for x, u in zip(t, uniforms().tolist(), strict=True)
    ]
    assert (counts == np.stack(expected)).all() and (counts.sum(-1) == num).all()
    assert (np.abs(counts - num * reference.softmax(t / temperature)) < 1).all()
    assert (stored["counts"][stored["ids"] < 0] == 0).all() and stored["ids"].dtype == torch.int32


@pytest.mark.parametrize("codec", STORED_LOSSES)
@pytest.mark.parametrize("offset", [0.0, 30.0, 100.0])
@pytest.mark.parametrize(
    ("temperature", "weights"), [(0.5, (0.3, 0.7)), (1.0, (0.0, 1.0)), (1.0, (0.3, 0.7)), (2.0, (0.3, 0.7))]
)
def test_values_and_gradients(codec: str, offset: float, temperature: float, weights: tuple[float, float]) -> None:
    """Offsets are in the biases. Factors are so coarse that fp32 holds every logit exactly."""
    student, teacher = make_heads()
    with torch.no_grad():
        for head in (student, teacher):
            for x in head[:3]:
                x.copy_((x * 16).round() / 16)  # pyright: ignore
            head.bias_v.add_(offset)  # pyright: ignore
    labels, mask = make_targets()
    stored = stored_of(codec, teacher, labels, temperature)
    loss = FusedLoss(
        STORED_LOSSES[codec](temperature, NUM), factor=temperature**2, num_true=V, chunk_tokens=5,
        lm_weight=weights[0], logits_weight=weights[1],
    )  # fmt: skip
    found = fused_linear_losses(student, StoredRows(stored, 0, PADDED), labels, mask, loss)
    (found.total * -0.37).backward()

    h, w, b = (numpy(x) for x in student[:3])  # pyright: ignore
    z, weight = h @ w[:V].T + b[:V], numpy(mask)
    kd, kd_slope = (temperature**2 * x for x in oracle(codec, z, numpy(logits_of(teacher)[:, :V]), stored, temperature))
    q, target = reference.softmax(z), np.eye(V)[labels]
    slope = weight[:, None] * (weights[0] * (q - target) + weights[1] * kd_slope)
    padded = np.pad(slope, ((0, 0), (0, PADDED - V)))
    expected = {"hidden": slope @ w[:V], "weight": padded.T @ h, "bias": padded.sum(0)}
    assert relative(found.lm, (-np.log((q * target).sum(-1)) * weight).sum()) < 1e-6
    assert relative(found.logits, (kd * weight).sum()) < 2e-6
    for x, which in zip(student[:3], GRADIENTS, strict=True):
        assert relative(x.grad, -0.37 * expected[which]) < 3e-6, which


NUM_STORES, BATCH = 20_000, 2_000


def mean_and_error(values: Array) -> tuple[Array, Array]:
    return values.mean(0), values.std(0) / len(values) ** 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("peaked", [True, False])
def test_the_mean_over_stores_is_forward_kl(temperature: float, peaked: bool) -> None:
    """Value and gradient of a token, over 20,000 stores, are those of the whole distribution, by 4 standard errors."""
    student, teacher = make_heads(bias=False, seed=4)
    if peaked:
        teacher = teacher._replace(scale=3.0)
    labels, rows = torch.zeros(BATCH, dtype=torch.int64), logits_of(teacher)[:1].repeat(BATCH, 1)
    loss = FusedLoss(STORED_LOSSES["sampled"](temperature, NUM), factor=temperature**2, num_true=V, chunk_tokens=BATCH)
    values, gradients = [], []
    for batch in range(NUM_STORES // BATCH):
        stored = encode("sampled", NUM, temperature, rows, labels, uniforms(BATCH, seed=batch))
        targets = StoredRows(stored, 0, PADDED)
        hidden = student.hidden_NH[:1].detach().repeat(BATCH, 1).requires_grad_()
        head = student._replace(hidden_NH=hidden, weight_vH=student.weight_vH.detach())
        fused_linear_losses(head, targets, labels, torch.ones(BATCH), loss).total.backward()
        assert hidden.grad is not None
        gradients.append(numpy(hidden.grad))
        z = head.frozen(PADDED).part(slice(None), V, torch.empty(BATCH, PADDED))
        values.append(numpy(metrics_against_stored(z, targets, labels, loss.divergence)["forward_kl"]))
    w = numpy(student.weight_vH)[:V]
    kl, slope = reference.forward_kl(numpy(student.hidden_NH)[:1] @ w.T, numpy(rows)[:1, :V], temperature)
    mean, error = mean_and_error(np.concatenate(values))
    assert abs(mean - kl[0]) < 4 * error
    mean, error = mean_and_error(np.concatenate(gradients))
    assert (np.abs(mean - temperature**2 * (slope @ w)[0]) < 4 * error + 1e-7).all()


def test_systematic_draws_vary_less_than_independent_ones() -> None:
    """Var(counts) = f (1 - f) with f the fraction of N p; independent draws would have N p (1 - p)."""
    _, teacher = make_heads(seed=4)
    t, label = logits_of(teacher)[:1].expand(BATCH, -1), torch.zeros(BATCH, dtype=torch.int64)
    counts = dense(encode("sampled", NUM, 1.0, t, label, uniforms(BATCH)), "counts")
    p = reference.softmax(numpy(t)[0, :V])
    f = NUM * p % 1
    variance, independent = counts.var(0).sum(), (NUM * p * (1 - p)).sum()
    assert variance == pytest.approx((f * (1 - f)).sum(), rel=0.05) and variance < independent

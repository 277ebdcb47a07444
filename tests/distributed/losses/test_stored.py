"""Stored targets with the vocabulary on 2 gloo processes: what teachers store, losses against it, and collectives."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from distill_nemo.losses.stored import STORED_LOSSES, encode
from distill_nemo.losses.stored.metrics import metrics_against_stored
from distill_nemo.losses.stored.rows import StoredRows
from tests import reference
from tests.distributed.losses.test_vocab_parallel import Collectives, shard, world
from tests.spawn import Gloo
from tests.unit.losses.test_fused_linear import GRADIENTS, PADDED, N, V, as_leaves, make_heads, make_targets, relative
from tests.unit.losses.test_stored import NUM, logits_of, numpy, oracle, uniforms

WEIGHTS = {"lm_weight": 0.3, "logits_weight": 0.7}
CODECS: Any = list(STORED_LOSSES)


@pytest.fixture(scope="module")
def group() -> Any:
    with Gloo(2) as gloo:
        yield gloo


def stored_and_losses(codec: Any, temperature: float, num_true: int) -> dict[str, Any]:
    student, teacher = make_heads()
    labels, mask = (x % num_true if i == 0 else x for i, x in enumerate(make_targets()))
    start = dist.get_rank() * PADDED // 2
    here = max(0, min(num_true - start, PADDED // 2))
    own = shard(logits_of(teacher, num_true), -1)
    with Collectives() as encoding:
        stored = encode(codec, NUM, temperature, own, labels, uniforms(), world(), start)
    student = as_leaves(Head(*(shard(x.detach(), 0) if i else x.detach() for i, x in enumerate(student[:3]))))  # pyright: ignore
    rows = StoredRows(stored, start, PADDED // 2)
    kind = {"group": world(), "vocab_start": start, "num_true": here, "chunk_tokens": 5}
    loss = FusedLoss(STORED_LOSSES[codec](temperature, NUM), factor=temperature**2, **WEIGHTS, **kind)
    with Collectives() as forward:
        found = fused_linear_losses(student, rows, labels, mask, loss)
    with Collectives() as backward:
        found.total.backward()
    z = torch.empty(N, PADDED // 2)
    with torch.no_grad():
        student.part(slice(None), here, z)
    metrics = metrics_against_stored(z, rows, labels, STORED_LOSSES[codec](temperature, NUM), world())
    gradients = {n: x.grad for x, n in zip(student[:3], GRADIENTS, strict=True)}
    counts = encoding, forward, backward
    return {"stored": stored, "losses": [x.detach() for x in found], "counts": counts, "metrics": metrics, **gradients}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("temperature", "num_true"), [(0.5, V), (1.0, V), (2.0, V), (2.0, 250)])
def test_teachers_and_students_are_those_of_one_process(
    group: Gloo, codec: Any, temperature: float, num_true: int
) -> None:
    """With 250 ids the second shard is all padding."""
    ranks = group.run(stored_and_losses, codec, temperature, num_true)
    (student, teacher), (labels, mask) = make_heads(), make_targets()
    labels, t = labels % num_true, logits_of(teacher, num_true)
    alone = encode(codec, NUM, temperature, t, labels, uniforms())
    for rank in ranks:
        assert rank["counts"] == (Counter(all_gather=2), Counter(all_gather=4), Counter())  # chunks of 5 tokens
        for name, x in alone.items():
            assert torch.allclose(rank["stored"][name], x, atol=1e-6) and rank["stored"][name].dtype == x.dtype, name
        assert all(torch.equal(x, y) for x, y in zip(rank["losses"], ranks[0]["losses"], strict=True))
        assert all(torch.equal(rank["metrics"][name], x) for name, x in ranks[0]["metrics"].items())
    h, w, b = (numpy(x) for x in student[:3])  # pyright: ignore
    z, weight, target = h @ w[:num_true].T + b[:num_true], numpy(mask), np.eye(num_true)[labels]
    kd, kd_slope = oracle(codec, z, numpy(t[:, :num_true]), alone, temperature)
    q, p = reference.softmax(z), reference.softmax(numpy(t[:, :num_true]))
    lm = -np.log((q * target).sum(-1))
    slope = weight[:, None] * (0.3 * (q - target) + 0.7 * temperature**2 * kd_slope)
    padded = np.pad(slope, ((0, 0), (0, PADDED - num_true)))
    _, found_lm, found_kd = ranks[0]["losses"]
    assert relative(found_lm, (lm * weight).sum()) < 1e-6
    assert relative(found_kd, temperature**2 * (kd * weight).sum()) < 1e-5
    assert relative(sum(rank["hidden"] for rank in ranks), slope @ w[:num_true]) < 1e-5
    assert relative(torch.cat([rank["weight"] for rank in ranks]), padded.T @ h) < 1e-5
    assert relative(torch.cat([rank["bias"] for rank in ranks]), padded.sum(0)) < 1e-5
    expected = {
        "lm_loss": lm,
        "forward_kl": kd,
        "top1_agreement": (z.argmax(-1) == p.argmax(-1)).astype(float),
        "teacher_entropy": -(p * np.log(p)).sum(-1),
        "teacher_lm_loss": -np.log((p * target).sum(-1)),
    }
    for name, values in expected.items():
        assert relative(ranks[0]["metrics"][name], values) < 1e-5, name

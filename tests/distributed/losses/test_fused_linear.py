"""Fused linear losses with the vocabulary on 2 and 4 gloo processes, against fp64, and the bytes that each rank sends.

Whole runs are tested with and without them. tests/parity has every layout's gradients against fp64.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_nemo.losses.fused_linear.chunks import Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from tests import reference
from tests.distributed.losses.test_vocab_parallel import Collectives, shard, world
from tests.spawn import Gloo
from tests.training import changed, differences, metrics, tiny_run
from tests.unit.losses.test_fused_linear import (
    GRADIENTS,
    PADDED,
    V,
    as_leaves,
    finished_heads,
    make_heads,
    make_targets,
    of,
    oracle,
    relative,
)

WEIGHTS = {"lm_weight": 0.3, "logits_weight": 0.7}
NUM_CHUNKS = 4  # the 18 valid tokens, 5 at a time


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def group(request: pytest.FixtureRequest) -> Iterator[Gloo]:
    with Gloo(request.param) as gloo:
        yield gloo


def heads(how: str) -> tuple[Head, Head]:
    return finished_heads(how) if how else make_heads()


def fused(name: str, temperature: float, num_true: int, how: str) -> dict[str, Any]:
    student, teacher = (
        Head(h.detach(), shard(w.detach(), 0), shard(b.detach(), 0), *finish) for h, w, b, *finish in heads(how)
    )
    student = as_leaves(student)
    start = dist.get_rank() * student.weight_vH.shape[0]
    here = max(0, min(num_true - start, student.weight_vH.shape[0]))
    changes = {"temperature": temperature, "factor": temperature**2, "vocab_start": start, "num_true": here}
    labels, mask = make_targets()
    with Collectives() as forward:
        found = fused_linear_losses(student, teacher, labels % num_true, mask, of(name, world(), **WEIGHTS, **changes))
    with Collectives() as backward:
        (found.total * 3).backward()
    gradients = {n: x.grad for x, n in zip(student[:3], GRADIENTS, strict=True)}
    return {"losses": [x.detach() for x in found], "collectives": (forward, backward), **gradients}


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "num_true", "how"),
    [(1.0, V, ""), (2.0, V, ""), (1.0, 250, ""), (2.0, 250, "scales and softcaps")],
    ids=["", "T=2", "a shard of padding", "scales, softcaps, a shard of padding"],
)
def test_fused_losses_equal_the_oracles(group: Gloo, name: str, temperature: float, num_true: int, how: str) -> None:
    """The caller sums the hidden states' gradient over ranks. All else is complete."""
    ranks = group.run(fused, name, temperature, num_true, how)
    (student, teacher), (labels, mask) = heads(how), make_targets()
    loss = of(name, temperature=temperature, factor=temperature**2, **WEIGHTS)
    expected = oracle(name, student, teacher, labels % num_true, mask, loss, num_true)
    num_gathers = NUM_CHUNKS * reference.DIVERGENCES[name].num_gathers
    for rank in ranks:
        assert all(torch.equal(x, y) for x, y in zip(rank["losses"], ranks[0]["losses"], strict=True))
        assert rank["collectives"] == (Counter(all_gather=num_gathers), Counter())
    _, lm, kd = ranks[0]["losses"]
    assert relative(lm, expected["lm"]) < 1e-6 and relative(kd, expected["logits"]) < 1e-5
    assert relative(sum(rank["hidden"] for rank in ranks), 3 * expected["hidden"]) < 1e-5
    for which in ("weight", "bias"):
        whole = torch.cat([rank[which] for rank in ranks])
        assert len(whole) == PADDED and relative(whole, 3 * expected[which]) < 1e-5


def order_of_events() -> list[str]:
    """Return the order of products and gathers on rank 0 for three chunks."""
    from distill_nemo.losses.collectives import Gather
    from distill_nemo.losses.fused_linear import gemm

    events, start, logits = [], Gather.start, gemm.logits

    def starting(*args: Any) -> Any:
        events.append("gather begins")
        wait = start(*args)

        def waiting() -> Any:
            events.append("gather is awaited")
            return wait()

        return waiting

    def multiplying(*args: Any) -> Any:
        events.append("logits")
        return logits(*args)

    Gather.start, gemm.logits = starting, multiplying
    try:
        student, teacher = (Head(h.detach(), shard(w.detach(), 0)) for h, w, *_ in make_heads())
        fused_linear_losses(student, teacher, *make_targets("none"), of("forward_kl", world(), chunk_tokens=8))
    finally:
        Gather.start, gemm.logits = start, logits
    return events


def test_a_chunks_collective_is_under_way_while_the_next_ones_logits_are_computed(group: Gloo) -> None:
    for events in group.run(order_of_events):
        one = ["logits", "logits", "gather begins"]  # student's and teacher's
        assert events == [*one, *one, "gather is awaited", *one, "gather is awaited", "gather is awaited"]


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP=2": {},
    "TP=2": {"parallelism.tensor_model_parallel_size": 2},
    "TP=2, SP": {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
    "PP=2": {"parallelism.pipeline_model_parallel_size": 2},
    "CP=2": {"parallelism.context_parallel_size": 2},
}


def train(inputs: Any, output: Any, changes: dict[str, Any]) -> list[str]:
    """Train in chunks of 6 tokens. Return the shapes that the last stage hands to the loss function."""
    from distill_nemo.losses.fused_linear import chunk_size
    from distill_nemo.models.distillation.fused_output import FusedLogits
    from distill_nemo.training.entry import run_config

    sizes = chunk_size.CHUNK_BYTES, chunk_size.CHUNK_TOKENS
    chunk_size.CHUNK_BYTES, chunk_size.CHUNK_TOKENS = 6 * 4 * PADDED, 1
    shapes, loss = [], FusedLogits.loss

    def watching(self: FusedLogits, output: Any, targets: Any) -> Any:
        shapes.append(output.shape[-1])
        return loss(self, output, targets)

    FusedLogits.loss = watching
    try:
        run_config(changed(tiny_run(inputs, output, steps=3, eval_interval=3), changes))
    finally:
        FusedLogits.loss = loss
        chunk_size.CHUNK_BYTES, chunk_size.CHUNK_TOKENS = sizes
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_those_of_whole_logits(inputs: Any, two: Gloo, tmp_path: Any, layout: str) -> None:
    """Compare losses, gradient norms and held-out metrics of three steps. Fused losses are the default."""
    weighed = {"distillation.lm_weight": 0.3, "distillation.temperature": 2.0, **LAYOUTS[layout]}
    fused = two.run(train, inputs, tmp_path / "fused", weighed)
    whole = two.run(train, inputs, tmp_path / "whole", weighed | {"distillation.fused_linear": False})
    assert set(fused[1]) == {32 + 64} and whole == [[], []]
    worst = differences(metrics(tmp_path / "fused"), metrics(tmp_path / "whole"))
    assert {"lm_loss", "logit_loss", "kd_loss", "grad_norm", "forward_kl", "top1_agreement"} <= worst.keys()
    assert max(worst.values()) < 1e-5, worst

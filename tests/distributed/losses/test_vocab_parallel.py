"""Losses on 2 and 4 gloo processes: values and gradients against fp64 on the whole tensors."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from distill_nemo.losses.hidden import HiddenStateCosineLoss, HiddenStateMSELoss
from distill_nemo.losses.kernels.dispatch import VARIABLE
from distill_nemo.losses.logits import LogitsKLLoss
from distill_nemo.losses.metrics import vocab_parallel_entropy, vocab_parallel_top1_agreement
from tests import reference
from tests.kernels import skip_if_unusable
from tests.spawn import Gloo

S, B, V, PADDED = 8, 3, 507, 512


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def group(request: pytest.FixtureRequest) -> Iterator[Gloo]:
    with Gloo(request.param) as gloo:
        yield gloo


def make_pair(width: int, seed: int = 0, kind: str = "") -> tuple[Tensor, Tensor]:
    """Return student and teacher logits of one of the kinds below."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(S, B, width, generator=generator) for _ in range(2))
    if kind == "ties":
        teacher = (teacher / 2).round()
    elif kind == "offsets":
        offsets_SB1 = torch.linspace(-1000, 2000, S * B).view(S, B, 1)
        student, teacher = student + offsets_SB1, teacher + offsets_SB1.flip(0)
    elif kind == "peaks far apart":  # between the shards of 2 and of 4 ranks
        apart_v = torch.tensor([1000.0, 1003.0, 700.0, 1001.0]).repeat_interleave(width // 4)
        student, teacher = student + apart_v, teacher - apart_v.flip(0)
    return student, teacher


def shard(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


class Collectives:
    """Counter of collectives that this process calls by their names in torch.distributed."""

    num_bytes = 0  # given to all-gathers by this rank

    def __enter__(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        names = [n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier"))]
        self.saved: dict[str, Any] = {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}

        def counting(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                counts[name] += 1
                self.num_bytes += args[1].nbytes if name == "all_gather" else 0
                return self.saved[name](*args, **kwargs)

            return call

        for name in self.saved:
            setattr(dist, name, counting(name))
        return counts

    def __exit__(self, *exception: object) -> None:
        for name, function in self.saved.items():
            setattr(dist, name, function)


def world() -> ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def logits_loss(
    name: str, vocab_size: int, temperature: float, dtype: torch.dtype, weights: Tensor, kind: str, kernels: str
) -> dict[str, Any]:
    os.environ[VARIABLE] = kernels
    student, teacher = (shard(x.to(dtype), -1) for x in make_pair(PADDED, kind=kind))
    student.requires_grad_()
    module = LogitsKLLoss(
        temperature=temperature,
        true_vocab_size=vocab_size,
        group=world(),
        vocab_start=dist.get_rank() * student.shape[-1],
        **reference.DIVERGENCES[name][0],
    )
    collectives = Collectives()
    with collectives as forward:
        loss = module(student, teacher)
    with Collectives() as backward:
        (loss * weights).sum().backward()
    pair = module.prepare(student, teacher)
    return {
        "loss": loss.detach(),
        "gradient": student.grad,
        "collectives": (dict(forward), dict(backward)),
        "bytes of a token": collectives.num_bytes / (S * B),
        "entropy": vocab_parallel_entropy(pair[1], world()),
        "agreement": vocab_parallel_top1_agreement(*pair, world()),
    }


def check_logits_loss(
    group: Gloo,
    name: str,
    vocab_size: int,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    kind: str = "",
    kernels: str = "",
) -> None:
    """Check value, gradient (under an upstream one other than 1) and collectives on every rank."""
    weights = torch.rand(B, S)
    ranks = group.run(logits_loss, name, vocab_size, temperature, dtype, weights, kind, kernels)
    student, teacher = (x.to(dtype)[..., :vocab_size].double().numpy() for x in make_pair(PADDED, kind=kind))
    value, gradient = (temperature**2 * x for x in reference.DIVERGENCES[name][1](student, teacher, temperature))
    expected = reference.DIVERGENCES[name]
    top_k = expected.arguments.get("top_k")
    num_bytes = 8 * (min(top_k, PADDED // len(ranks)) + 2) if top_k else expected.num_bytes
    for rank in ranks:
        assert torch.equal(rank["loss"], ranks[0]["loss"])
        assert rank["collectives"] == ({"all_gather": expected.num_gathers}, {})
        assert rank["bytes of a token"] == num_bytes
    size = max(1.0, value.max() / 100)  # in the hundreds if peaks are far apart
    np.testing.assert_allclose(ranks[0]["loss"], value.T, rtol=0, atol=2e-5 * temperature**2 * size)
    whole = torch.cat([rank["gradient"] for rank in ranks], dim=-1)
    assert whole.dtype == dtype
    resolution = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(
        whole[..., :vocab_size].double(),
        gradient * weights.T.double().numpy()[..., None],
        rtol=resolution,
        atol=4e-7 * temperature + 3e-6 * np.abs(gradient).max(),
    )
    assert torch.equal(whole[..., vocab_size:], torch.zeros_like(whole[..., vocab_size:]))
    np.testing.assert_allclose(ranks[-1]["entropy"], reference.entropy(teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("vocab_size", [V, 250], ids=["padded", "a shard of padding only"])
@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float32), (2.0, torch.float32), (1.0, torch.bfloat16)])
def test_a_sharded_logits_loss_is_whole(
    group: Gloo, name: str, vocab_size: int, temperature: float, dtype: torch.dtype
) -> None:
    check_logits_loss(group, name, vocab_size, temperature, dtype)


@pytest.mark.parametrize("group", [2], indirect=True, ids=["tp2"])
@pytest.mark.parametrize("name", [name for name in reference.DIVERGENCES if not name.startswith("top")])
@pytest.mark.parametrize("vocab_size", [V, 250], ids=["padded", "a shard of padding only"])
@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_a_sharded_logits_loss_is_whole_by_other_kernels_than_c(
    group: Gloo, name: str, vocab_size: int, kernels: str
) -> None:
    skip_if_unusable(kernels)
    check_logits_loss(group, name, vocab_size, temperature=2.0, kernels=kernels)


@pytest.mark.parametrize("name", ["top 1", "top 20", "top 300"])
def test_ties_go_to_the_lowest_column_of_all_shards(group: Gloo, name: str) -> None:
    check_logits_loss(group, name, V, kind="ties")


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("kind", ["offsets", "peaks far apart"])
def test_no_digit_is_lost_to_offsets_of_tokens_and_shards(group: Gloo, name: str, kind: str) -> None:
    for temperature in (1.0, 3.0):
        check_logits_loss(group, name, V, temperature, kind=kind)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    return vocab_parallel_top1_agreement(shard(student, -1), shard(teacher, -1), world())


def test_top1_agreement(group: Gloo) -> None:
    student, teacher = make_pair(PADDED)
    student[:4] = teacher[:4] + 1.0
    student[4, 0, [3, 500]] = teacher[4, 0, [3, 200]] = 99.0  # ties on several ranks: the lowest index on both sides
    student[4, 1, [3, 500]] = teacher[4, 1, [4, 500]] = 99.0
    expected = student.numpy().argmax(-1) == teacher.numpy().argmax(-1)
    assert expected[4, :2].tolist() == [True, False]
    for rank in group.run(agreement, student, teacher):
        assert rank.tolist() == expected.astype(float).tolist()


def uneven_shards() -> None:
    LogitsKLLoss(group=world())(torch.zeros(1, 1, 128), torch.zeros(1, 1, 64))


def test_shards_of_other_widths_are_refused(group: Gloo) -> None:
    with pytest.raises(ValueError, match="student logits have 128 columns, teacher logits 64"):
        group.run(uneven_shards)


def hidden_loss(loss_class: type, weights: Tensor) -> dict[str, Any]:
    student, teacher = shard(make_pair(48)[0], 0).requires_grad_(), shard(make_pair(64, seed=1)[1], 0)
    torch.manual_seed(0)
    module = loss_class(48, 64, world())
    with Collectives() as forward:
        loss = module(student, teacher)
    with Collectives() as backward:
        (loss * weights).sum().backward()  # every rank computes the same total
    weight = module.projection.weight
    assert weight.sequence_parallel
    dist.all_reduce(weight.grad)  # what Megatron does with a weight so marked
    return {
        "loss": loss.detach(),
        "gradient": student.grad,
        "weight_gradient": weight.grad,
        "collectives": (dict(forward), dict(backward)),
    }


@pytest.mark.parametrize("oracle", ["cosine", "mse"])
def test_hidden_loss_under_sequence_parallelism(group: Gloo, oracle: str) -> None:
    loss_class = {"cosine": HiddenStateCosineLoss, "mse": HiddenStateMSELoss}[oracle]
    weights = torch.rand(B, S)
    ranks = group.run(hidden_loss, loss_class, weights)
    torch.manual_seed(0)
    matrix = torch.nn.Linear(48, 64, bias=False).weight.detach().double().numpy()
    student, teacher = make_pair(48)[0].double().numpy(), make_pair(64, seed=1)[1].double().numpy()
    value, gradient = getattr(reference, oracle)(student @ matrix.T, teacher)
    gradient = gradient * weights.T.double().numpy()[..., None]
    for rank in ranks:
        assert rank["collectives"] == ({"all_gather": 1}, {})
        np.testing.assert_allclose(rank["loss"], value.T, rtol=1e-5, atol=1e-6)
        expected = gradient.reshape(-1, 64).T @ student.reshape(-1, 48)
        np.testing.assert_allclose(rank["weight_gradient"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(torch.cat([r["gradient"] for r in ranks]), gradient @ matrix, rtol=1e-4, atol=1e-5)

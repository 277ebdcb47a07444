"""Our losses and dynamic balancer against those of ModelOpt's Megatron plugin: the real classes on the same tensors.

In the first half, where ModelOpt is right, values and gradients are equal. The second half pins down differences, as
of 0.47, so that a test fails if they change. docs/semantics.md has the table. Legend: as in `tests/reference.py`.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer
from distill_nemo.config import ParallelismConfig
from distill_nemo.losses.hidden import HiddenStateCosineLoss, HiddenStateMSELoss
from distill_nemo.losses.logits import LogitsKLLoss
from distill_nemo.runtime.device import setup_device
from tests import reference

TOLERANCE = 1e-5
S, B, V, WIDTH, TEACHERS_WIDTH = 8, 3, 512, 32, 48
HEAT = {"temperature": 2.0}
LOGITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of our class, and of ModelOpt's
    "forward KL": ({}, {}),
    "forward KL, T=2": (HEAT | {"scale_by_temperature_squared": False}, HEAT),
    "reverse KL": ({"divergence": "reverse_kl"}, {"reverse": True}),
    "reverse KL, T=2": (
        HEAT | {"divergence": "reverse_kl", "scale_by_temperature_squared": False},
        HEAT | {"reverse": True},
    ),
}
HIDDEN = {"cosine": (HiddenStateCosineLoss, "HiddenStateCosineLoss"), "mse": (HiddenStateMSELoss, "MSELoss")}


def plugin() -> Any:
    setup_device()
    from modelopt.torch.distill.plugins import megatron

    return megatron


def megatron_config(tensor: int = 1, width: int = WIDTH) -> Any:
    setup_device()
    from megatron.core.transformer import TransformerConfig

    sizes = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    return TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=4, **sizes)


def in_groups(parallelism: dict[str, int], function: Any, *args: Any) -> Any:
    """Return `function(*args)` in a process with Megatron's parallel state."""
    setup_device()
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(ParallelismConfig(**parallelism)):
        return function(*args)


def at(tensor: int, one: Any, two: Any, function: Any, *args: Any) -> list[Any]:
    """Return each rank's result at this tensor-parallel size."""
    return {1: one, 2: two}[tensor].run(in_groups, {"tensor_model_parallel_size": tensor}, function, *args)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logit_pair() -> tuple[Tensor, Tensor]:
    """Return student and teacher logits, [S, B, V] each."""
    return 4 * normal(S, B, V, seed=0), 4 * normal(S, B, V, seed=1)


def shard(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def relative(found: Tensor, expected: Any) -> float:
    """Return the largest difference relative to the largest entry."""
    expected = torch.as_tensor(np.asarray(expected)).double()
    return float((found.double() - expected).abs().max() / expected.abs().max())


def whole_sum(value: Tensor, reduced: bool) -> float:
    """Sum a loss of which each rank has a part, as Megatron-LM does."""
    total = value.detach().clone()
    if reduced:
        dist.all_reduce(total)
    return total.item()


def both_logits(ours: dict[str, Any], modelopts: dict[str, Any], class_name: str = "LogitsKLLoss") -> dict[str, Any]:
    """Return, by implementation, (weighted sum over tokens, gradient of this rank's shard); weights are not 1."""
    weights_BS, found = normal(B, S, seed=2).abs(), {}
    start = dist.get_rank() * (V // dist.get_world_size())
    our_loss = LogitsKLLoss(**ours, true_vocab_size=V, group=dist.group.WORLD, vocab_start=start)
    their_loss = getattr(plugin(), class_name)(megatron_config(dist.get_world_size()), **modelopts)
    for whose, loss in (("ours", our_loss), ("ModelOpt's", their_loss)):
        student, teacher = (shard(x, -1) for x in logit_pair())
        student.requires_grad_()
        output = loss(student, teacher)
        loss_BS, parts, _ = output if isinstance(output, tuple) else (output, False, False)
        total = (loss_BS * weights_BS).sum()
        total.backward()
        found[whose] = (whole_sum(total, parts), student.grad)
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", LOGITS)
def test_logits_losses_agree(one, two, name: str, tensor: int) -> None:
    for rank in at(tensor, one, two, both_logits, *LOGITS[name]):
        assert rank["ours"][0] == pytest.approx(rank["ModelOpt's"][0], rel=TOLERANCE)
        assert relative(rank["ours"][1], rank["ModelOpt's"][1]) < TOLERANCE


def both_hidden(name: str, width: int) -> dict[str, Any]:
    """Return (weighted sum over tokens, gradients of this rank's slice of the sequence and of the projection)."""
    tensor, found = dist.get_world_size(), {}
    split = tensor > 1  # sequence parallel: each rank has a part of the sequence
    weights_BS = normal(B, S, seed=2).abs()
    our_class, their_class = HIDDEN[name]
    config = megatron_config(tensor, width)
    projection = plugin().ProjectionLayer(config, megatron_config(tensor, TEACHERS_WIDTH))
    ours = our_class(width, TEACHERS_WIDTH, dist.group.WORLD if split else None)
    theirs = getattr(plugin(), their_class)(config, projection_layer=projection)
    if ours.projection is not None:
        ours.projection.weight.data.copy_(normal(TEACHERS_WIDTH, width, seed=3))
        projection._fit.weight.data.copy_(ours.projection.weight.data)
    for whose, loss in (("ours", ours), ("ModelOpt's", theirs)):
        student, teacher = shard(normal(S, B, width, seed=4), 0), shard(normal(S, B, TEACHERS_WIDTH, seed=5), 0)
        student.requires_grad_()
        output = loss(student, teacher)
        loss_BS, _, parts = output if isinstance(output, tuple) else (output, False, False)
        total = (loss_BS * (shard(weights_BS, 1) if parts else weights_BS)).sum()
        total.backward()
        layer = ours.projection if whose == "ours" else getattr(projection, "_fit", None)
        weight = getattr(layer, "weight", None)
        found[whose] = (whole_sum(total, parts), student.grad, None if weight is None else weight.grad)
        marked = bool(getattr(weight, "sequence_parallel", False))
        assert weight is None or marked == split, "Megatron sums marked gradients over the tensor-parallel ranks"
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("width", [TEACHERS_WIDTH, WIDTH], ids=["same width", "projected"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_losses_and_projection_agree(one, two, name: str, width: int, tensor: int) -> None:
    """Two ranks use sequence parallelism. ModelOpt's projection starts with a bias of zero; ours has none."""
    for rank in at(tensor, one, two, both_hidden, name, width):
        (value, gradient, slope), (their_value, their_gradient, their_slope) = rank["ours"], rank["ModelOpt's"]
        assert value == pytest.approx(their_value, rel=TOLERANCE)
        assert relative(gradient, their_gradient) < TOLERANCE
        assert (slope is None) == (width == TEACHERS_WIDTH)
        if slope is not None:
            assert relative(slope, their_slope) < TOLERANCE


STUDENT, KL, COSINE, MSE = "student_loss", "LogitsKLLoss_0", "HiddenStateCosineLoss_1", "MSELoss_2"


def balance(balancer: Any, values: dict[str, float]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Return the total, its derivative with respect to every loss, and the remaining entries of the dict."""
    losses = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    given = dict(losses)
    output = balancer(given)
    total = output["kd_loss"] if isinstance(output, dict) else output
    total.backward()
    weights = {name: 0.0 if loss.grad is None else loss.grad.item() for name, loss in losses.items()}
    return total.item(), weights, given


@pytest.mark.filterwarnings("ignore:To copy construct")  # ModelOpt's, if no intermediate loss is positive
@pytest.mark.parametrize("arguments", [{}, {"kd_loss_scale": 0.7}, {"skip_original_loss": True}])
@pytest.mark.parametrize(
    "losses",
    [
        {STUDENT: 3.0, KL: 1.1},
        {STUDENT: 3.0, KL: 1.1, COSINE: 0.3},
        {STUDENT: 3.0, KL: 1.1, COSINE: 0.3, MSE: 0.75},
        {STUDENT: 0.4, KL: 2.0, MSE: 5.0},
        {STUDENT: 3.0, KL: 0.0, COSINE: 0.0},
        {STUDENT: 3.0, KL: 1.1, COSINE: 0.0},
    ],
)
def test_dynamic_balancers_agree_within_the_limit(losses: dict[str, float], arguments: dict[str, Any]) -> None:
    total, weights, _ = balance(LogitsAndIntermediatesLossBalancer(**arguments), losses)
    theirs, their_weights, _ = balance(plugin().LogitsAndIntermediatesLossBalancer(**arguments), losses)
    assert total == pytest.approx(theirs, rel=TOLERANCE)
    assert {n: w for n, w in weights.items() if losses[n]} == pytest.approx(
        {n: w for n, w in their_weights.items() if losses[n]}, rel=TOLERANCE
    )


# Differences from ModelOpt 0.47.


def test_top_k_gradient_grows_with_tensor_parallelism_in_modelopt_only(one, two) -> None:
    """ModelOpt's all-gather sums gradients of equal losses over ranks. Ours equal those of fp64 at both sizes."""
    arguments = {"top_k": 20}, {"top_k": 20}, "TopKLogitsKLLoss"
    (alone,) = at(1, one, two, both_logits, *arguments)
    ranks = at(2, one, two, both_logits, *arguments)
    whole = {whose: torch.cat([rank[whose][1] for rank in ranks], dim=-1) for whose in alone}
    assert ranks[0]["ModelOpt's"][0] == pytest.approx(alone["ModelOpt's"][0], rel=TOLERANCE)
    assert relative(whole["ModelOpt's"], 2.0 * alone["ModelOpt's"][1]) < TOLERANCE

    weights_SB = normal(B, S, seed=2).abs().T.double().numpy()
    value, gradient = reference.top_k_forward_kl(*(x.double().numpy() for x in logit_pair()), top_k=20)
    for found, slope in ((alone["ours"][0], alone["ours"][1]), (ranks[0]["ours"][0], whole["ours"])):
        assert found == pytest.approx((value * weights_SB).sum(), rel=TOLERANCE)
        assert relative(slope, gradient * weights_SB[..., None]) < TOLERANCE


def test_top_k_of_modelopt_has_no_gradient_outside_k(one) -> None:
    """ModelOpt normalises both sides over the k tokens. Ours uses the vocabulary, with a bucket for the rest."""
    (found,) = at(1, one, None, both_logits, {"top_k": 20}, {"top_k": 20}, "TopKLogitsKLLoss")
    moved = {whose: (gradient != 0).sum(dim=-1) for whose, (_, gradient) in found.items()}
    assert (moved["ModelOpt's"] <= 20).all()
    assert (moved["ours"] > V // 2).all()
    assert found["ModelOpt's"][0] != pytest.approx(found["ours"][0], rel=0.01)


def test_modelopt_does_not_multiply_by_temperature_squared(one) -> None:
    (found,) = at(1, one, None, both_logits, {"temperature": 2.0}, {"temperature": 2.0})
    assert found["ours"][0] == pytest.approx(4.0 * found["ModelOpt's"][0], rel=TOLERANCE)
    assert relative(found["ours"][1], 4.0 * found["ModelOpt's"][1]) < TOLERANCE


def test_modelopt_counts_the_padded_vocabulary() -> None:
    """Columns from 507 on are padding. If they hold -inf, as after our output layer, ModelOpt's loss is NaN."""
    student, teacher = logit_pair()
    theirs = plugin().LogitsKLLoss(megatron_config())
    as_numpy = [x.double().numpy() for x in (student, teacher)]
    with_padding, without = (reference.forward_kl(*(x[..., :n] for x in as_numpy))[0].T for n in (V, 507))
    assert relative(theirs(student, teacher)[0], with_padding) < TOLERANCE
    ours = LogitsKLLoss(true_vocab_size=507)
    assert relative(ours(student, teacher), without) < TOLERANCE
    assert relative(torch.as_tensor(with_padding), without) > 1e-3
    for x in (student, teacher):
        x[..., 507:] = -torch.inf
    assert theirs(student, teacher)[0].isnan().all()
    assert relative(ours(student, teacher), without) < TOLERANCE


def test_hidden_losses_of_modelopt_keep_the_dtype_they_get() -> None:
    states = [normal(S, B, WIDTH, seed=seed).bfloat16() for seed in (4, 5)]
    for our_class, their_class in HIDDEN.values():
        theirs = getattr(plugin(), their_class)(megatron_config())
        assert theirs(*states)[0].dtype == torch.bfloat16
        assert our_class(WIDTH, WIDTH)(*states).dtype == torch.float32


def test_modelopt_amplifies_without_limit() -> None:
    losses = {STUDENT: 2.0, KL: 1e-4}
    _, weights, _ = balance(plugin().LogitsAndIntermediatesLossBalancer(), losses)
    assert weights[KL] == pytest.approx(20_000, rel=TOLERANCE)
    _, weights, _ = balance(LogitsAndIntermediatesLossBalancer(), losses)
    assert weights[KL] == pytest.approx(10.0)


def test_modelopt_empties_the_callers_dict_and_returns_another() -> None:
    losses = {STUDENT: 2.0, KL: 1.0, COSINE: 0.5}
    theirs = plugin().LogitsAndIntermediatesLossBalancer()
    _, _, left = balance(theirs, losses)
    assert list(left) == [COSINE]
    answer = theirs({name: torch.tensor(value) for name, value in losses.items()})
    assert list(answer) == ["kd_loss", "logits_loss", "intermediate_loss"]
    _, _, left = balance(LogitsAndIntermediatesLossBalancer(), losses)
    assert list(left) == list(losses)


def test_modelopt_needs_a_logits_loss_and_the_student_loss() -> None:
    theirs = plugin().LogitsAndIntermediatesLossBalancer
    with pytest.raises(UnboundLocalError, match="logits_key"):
        balance(theirs(), {STUDENT: 2.0, COSINE: 0.5})
    with pytest.raises(KeyError, match=STUDENT):
        balance(theirs(skip_original_loss=True), {KL: 1.0})
    assert balance(LogitsAndIntermediatesLossBalancer(), {STUDENT: 2.0, COSINE: 0.5})[0] == pytest.approx(4.0)
    assert balance(LogitsAndIntermediatesLossBalancer(skip_original_loss=True), {KL: 1.0})[0] == pytest.approx(1.0)


def test_modelopt_takes_all_but_the_last_logits_loss_for_intermediate_ones() -> None:
    losses = {KL: 1.0, "LogitsKLLoss_1": 4.0, STUDENT: 2.0}
    _, weights, _ = balance(plugin().LogitsAndIntermediatesLossBalancer(skip_original_loss=True), losses)
    assert weights == pytest.approx({KL: 4.0, "LogitsKLLoss_1": 1.0, STUDENT: 0.0})
    _, weights, _ = balance(LogitsAndIntermediatesLossBalancer(skip_original_loss=True), losses)
    assert weights == pytest.approx({KL: 1.0, "LogitsKLLoss_1": 1.0, STUDENT: 0.0})


def test_modelopt_leaves_distillation_unscaled_where_the_student_loss_is_zero() -> None:
    """A rank without valid tokens has such a loss. Ours scales to zero; in training, global means are never zero."""
    losses = {STUDENT: 0.0, KL: 1.0}
    assert balance(plugin().LogitsAndIntermediatesLossBalancer(), losses)[1][KL] == 1.0
    assert balance(LogitsAndIntermediatesLossBalancer(), losses)[1][KL] == 0.0


def test_modelopt_weighs_every_micro_batch_by_itself() -> None:
    """The gradient depends on how the global batch is split and spread. Ours is linear after its first observation."""
    micro_batches = [{STUDENT: 2.0, KL: 1.0}, {STUDENT: 2.0, KL: 0.5}]
    theirs, ours = plugin().LogitsAndIntermediatesLossBalancer(), LogitsAndIntermediatesLossBalancer()
    ours.observe({"lm_loss": 2.0, "logit_loss": 0.75})
    assert [balance(theirs, x)[1][KL] for x in micro_batches] == pytest.approx([2.0, 4.0])
    assert [balance(ours, x)[1][KL] for x in micro_batches] == pytest.approx([2.0 / 0.75] * 2)

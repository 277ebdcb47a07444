"""Kernels of the losses, beyond what the tests of the divergences check for each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.cross_entropy import lm_gradient, local_lse
from distill_nemo.losses.divergences import DIVERGENCES
from distill_nemo.losses.divergences.forward_kl import ForwardKL
from distill_nemo.losses.divergences.reverse_kl import ReverseKL
from distill_nemo.losses.kernels import cpu_kernels, eager
from distill_nemo.losses.kernels.dispatch import VARIABLE, choose_kernels
from tests import reference
from tests.unit.losses.test_losses import error, make_logits

HAS_C = pytest.mark.skipif(cpu_kernels.library() is None, reason="no C compiler")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("c", torch.float32), ("c", torch.bfloat16), ("triton", torch.float32)],
    indirect=["kernels"],
)
def test_kernels_are_as_exact_as_torch_over_many_blocks(
    monkeypatch: pytest.MonkeyPatch, kernels: str, name: str, dtype: torch.dtype
) -> None:
    """Peaks rise from block to block, some blocks hold only -inf, and most weights are 0."""
    columns, found = torch.arange(9001.0) / 1000, {}
    for each in (kernels, "eager"):
        monkeypatch.setenv(VARIABLE, each)
        student, teacher = make_logits(seed=6, width=9001, dtype=dtype)
        with torch.no_grad():
            student[1:4].add_(4 * columns)
            teacher[2:5].sub_(40 * columns)
            student[..., 3000:6000] = teacher[..., 3000:6000] = -torch.inf
        loss = DIVERGENCES[name](3.0)(student, teacher)
        loss.sum().backward()
        finite = student.detach().isfinite()[0, 0].numpy()
        pair = (x.detach().double().numpy()[..., finite] for x in (student, teacher))
        value, gradient = getattr(reference, name)(*pair, 3.0)
        assert student.grad is not None and student.grad[..., 3000:6000].abs().max() == 0
        found[each] = error(loss, value), error(student.grad[..., torch.from_numpy(finite)], gradient)
        few_last_places = 3e-7 * value.max()  # of losses around 100; reverse KL's gradient has the mean's error
    assert all(c <= torchs + few_last_places for c, torchs in zip(found[kernels], found["eager"], strict=True))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kernels", ["eager", "triton"], indirect=True)
def test_a_gradient_in_another_dtype_is_that_of_fp32_rounded(kernels: str, name: str) -> None:
    """The gradient includes the LM loss, for one token nothing else. C writes no other dtype."""
    divergence, (student, teacher) = DIVERGENCES[name](2.0), make_logits(seed=3, width=5000)
    z, t = (x.detach().flatten(0, 1) for x in (student, teacher))
    stats = divergence.begin(z, t)
    _, saved = divergence.finish(stats._replace(shard=stats.shard[None]), Gather())
    grad = torch.linspace(0, 1, len(z))
    lm = lm_gradient(torch.arange(len(z)) * 700, 0, 5000, local_lse(z), 1 - grad)
    found = {}
    for dtype in (torch.float32, torch.float16):
        out = t.clone() if dtype == torch.float32 else torch.empty_like(t, dtype=dtype)
        teacher_logits = out if dtype == torch.float32 else t
        found[dtype] = divergence.gradient(z.clone(), teacher_logits, saved, grad, out, lm)
        assert found[dtype] is out
    assert torch.equal(found[torch.float32].half(), found[torch.float16])
    alone = (z[0].softmax(-1) - torch.nn.functional.one_hot(torch.tensor(0), 5000)).double()
    torch.testing.assert_close(found[torch.float32][0].double(), alone, atol=1e-6, rtol=1e-5)


@HAS_C
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_c_is_chosen_and_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    found = []
    for num_threads in (1, 2, 3):
        student, teacher = make_logits(dtype=dtype)
        assert choose_kernels(student, teacher) == "c"
        torch.set_num_threads(num_threads)
        try:
            loss = ForwardKL()(student, teacher)
            loss.sum().backward()
        finally:
            torch.set_num_threads(1)
        found.append((loss, student.grad))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


EXTREME = {
    "every column masked by a finite number": lambda x, y: (x.fill_(-1e9), y.fill_(-1e9)),
    "by the least": lambda x, y: (x.fill_(torch.finfo(x.dtype).min), y.fill_(torch.finfo(x.dtype).min)),
    "some masked by the least": lambda x, y: (x[300:].fill_(-3.3e38), y[300:].fill_(-3.3e38)),
    "huge": lambda x, y: (x.mul_(8e5), y.mul_(8e5)),
    "a peak after a column of one side": lambda x, y: (x[256:].add_(2000.0), y[0].fill_(-torch.inf)),
    "a peak before": lambda x, y: (x[:256].add_(2000.0), y[300].fill_(-torch.inf)),
    "NaN": lambda x, y: (x[5].fill_(torch.nan), y),
    "NaN of a teacher": lambda x, y: (x, y[511].fill_(torch.nan)),
}


@HAS_C
@pytest.mark.parametrize("change", [lambda x, y: None, *EXTREME.values()], ids=["usual", *EXTREME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [512, 507])
def test_the_log_sum_exp_alone_has_the_bits_of_the_statistics(
    change: Callable[..., object], dtype: torch.dtype, width: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(512, generator=generator).mul_(4).to(dtype) for _ in range(2))
    change(x, y)
    for z in (x[None, :width], y[None, :width]):
        expected = cpu_kernels.kl_statistics(z, z, 0.7)[:2]
        assert cpu_kernels.log_sum_exp(z, 0.7).numpy().tobytes() == expected.numpy().tobytes()


@HAS_C
@pytest.mark.parametrize("width", [5000, 507])
def test_softmax_gradients_in_c_are_torchs(width: int) -> None:
    """Some terms have no scale, some tokens none at all, and their logits may be NaN. Columns may repeat."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(9, width, generator=generator).mul_(4)
    z[:, 100:300], z[4] = -torch.inf, torch.nan
    scale, other = torch.rand(2, 9, generator=generator)
    scale[[2, 4]] = other[[3, 4]] = 0
    column, value = torch.randint(width, (9, 20), generator=generator), torch.randn(9, 20, generator=generator)
    column[:, 1], value[4] = column[:, 0], 0
    for second in (None, (z.amax(-1), other)):
        arguments = 2.0, z.amax(-1), scale, second, column, value
        expected = eager.softmax_gradient(z, *arguments, torch.empty_like(z))
        in_place = z.clone()
        found = cpu_kernels.softmax_gradient(in_place, *arguments, in_place)
        assert found is in_place and found[4].abs().max() == 0
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@HAS_C
@pytest.mark.parametrize("change", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_is_torch_at_the_ends_of_what_fp32_holds(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., object], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(512, generator=generator).mul_(4).to(dtype) for _ in range(2))
    change(x, y)
    pair, found = (x[None, None], y[None, None]), []
    for kernels, kl_statistics in (("c", cpu_kernels.kl_statistics), ("eager", eager.kl_statistics)):
        monkeypatch.setenv(VARIABLE, kernels)
        statistics, gradients = kl_statistics(*pair, 1.0), []
        of_student, of_teacher, mean = statistics[:2], statistics[2:4], statistics[4]
        for divergence, saved in (
            (ForwardKL(), (of_student, of_teacher)),
            (ReverseKL(), (of_student, of_teacher[0], mean)),
        ):
            out = torch.empty_like(pair[0])
            gradients.append(divergence.gradient(*pair, saved, torch.ones(1, 1), out))
        found.append((statistics, *gradients))
    for c, torchs in zip(*found, strict=True):
        rtol = 2e-6 + (0.0 if c.dtype == torch.float32 else 16e-3)  # two units in the last place of bf16
        torch.testing.assert_close(c, torchs, rtol=rtol, atol=1e-6, equal_nan=True)


@HAS_C
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], ids=hex)
def test_no_upstream_nan_is_rounded_to_a_number(bits: int, dtype: torch.dtype) -> None:
    student, teacher = make_logits(dtype=dtype)
    loss = ForwardKL()(student, teacher)
    loss.backward(torch.tensor([bits], dtype=torch.uint32).view(torch.float32).expand_as(loss))
    assert student.grad is not None and student.grad.isnan().all()


@HAS_C
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_c_writes_fp32_whatever_the_default_dtype(default: torch.dtype) -> None:
    student, teacher = make_logits()
    expected = ForwardKL()(student, teacher)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(ForwardKL()(student, teacher), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_c_cannot_take_goes_to_torch() -> None:
    student, teacher = make_logits()
    assert choose_kernels(student.half(), teacher.half()) == "eager"
    assert choose_kernels(student.half(), teacher) == "eager"
    assert choose_kernels(student.transpose(0, 2), teacher.transpose(0, 2)) == "eager"
    assert choose_kernels(student, teacher[:1]) == "eager"
    assert choose_kernels(student, teacher.to("meta")) == "eager"
    assert choose_kernels(student, teacher, student.half()) == "eager"


@pytest.mark.parametrize("missing", ["compiler", "place to write"])
def test_without_c_torch_does_it(tmp_path: Path, missing: str) -> None:
    """PATH holds no compiler, or the cache is a file."""
    (tmp_path / "file").touch()
    changes = {"XDG_CACHE_HOME": str(tmp_path)} | (
        {"PATH": str(tmp_path), "CC": "nothing"}
        if missing == "compiler"
        else {"XDG_CACHE_HOME": str(tmp_path / "file")}
    )
    code = (
        "import torch; from distill_nemo.losses.kernels.dispatch import choose_kernels; x = torch.zeros(2, 3, 8);"
        "assert choose_kernels(x, x) == 'eager'; print('torch')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | changes, capture_output=True, text=True
    )
    assert result.stdout == "torch\n", result.stderr


def test_a_misspelt_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(
        ValueError, match='DISTILL_NEMO_KERNELS is "fast"; leave it unset, or set it to eager, c or triton'
    ):
        choose_kernels(torch.zeros(1, 1, 8))


# An H200 (132 multiprocessors at 1.75 GHz with 4 schedulers, a copy at 4.1 TB/s) is limited by memory up to 30
# instructions per column of bf16 in forward, and 45 in backward. Jensen-Shannon's logarithm takes more.
MOST_PER_COLUMN = {
    "statistics": 24,
    "forward_kl_gradient": 18,
    "forward_kl_gradient with LM": 31,
    "reverse_kl_gradient": 19,
    "reverse_kl_gradient with LM": 33,
    "jensen_shannon_kls": 60,
    "jensen_shannon_gradient": 58,
    "jensen_shannon_gradient with LM": 70,
}


@pytest.mark.long
def test_triton_for_hopper_spends_few_instructions_on_a_column(tmp_path: Path) -> None:
    """Compiled without a GPU. A division by the temperature alone made it 65."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", VARIABLE)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    assert found.keys() == MOST_PER_COLUMN.keys()
    for name, by_dtype in found.items():
        assert len(by_dtype) == 3 + (name.endswith("_gradient"))
        for one in by_dtype.values():
            assert 10 < one["per_column"] <= MOST_PER_COLUMN[name] and not one["spilled"]

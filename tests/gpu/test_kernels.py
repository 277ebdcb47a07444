"""Triton's kernels on the device, against fp64 and against torch on the same device."""

import numpy as np
import pytest
import torch

from distill_nemo.losses.divergences import DIVERGENCES
from distill_nemo.losses.fused_linear.chunks import Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from distill_nemo.losses.kernels.dispatch import VARIABLE
from tests import reference
from tests.gpu.conftest import REHEARSAL
from tests.kernels import skip_if_unusable
from tests.unit.losses.test_fused_linear import make_heads, make_targets, of, oracle, relative
from tests.unit.losses.test_kernels import EXTREME
from tests.unit.losses.test_losses import make_logits

WIDTH = 1003 if REHEARSAL else 128_259
FP32 = torch.float32
DTYPES = [FP32] if REHEARSAL else [FP32, torch.bfloat16, torch.float16]  # the interpreter does not round to bf16
pytestmark = pytest.mark.usefixtures("device")


def use(monkeypatch, kernels):
    """Choose the kernels. In a rehearsal the test is skipped if Triton's interpreter does not work with this numpy."""
    if REHEARSAL:
        skip_if_unusable(kernels)
    monkeypatch.setenv(VARIABLE, kernels)


def loss_and_gradient(monkeypatch, kernels, name, pair, temperature):
    use(monkeypatch, kernels)
    student, teacher = pair[0].detach().clone().requires_grad_(), pair[1].clone()
    loss = DIVERGENCES[name](temperature)(student, teacher)
    loss.sum().backward()
    return loss.detach(), student.grad


def error(x, expected):
    return float(np.abs(x.double().cpu().numpy() - expected).max())


@pytest.mark.parametrize("offset", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_triton_is_as_exact_as_torch(monkeypatch, device, name, dtype, temperature, offset):
    pair = [x.detach().add(offset).to(device, dtype) for x in make_logits(seed=1, width=WIDTH)]
    value, gradient = getattr(reference, name)(*(x.double().cpu().numpy() for x in pair), temperature)
    errors = {}
    for kernels in ("triton", "eager"):
        loss, grad = loss_and_gradient(monkeypatch, kernels, name, pair, temperature)
        errors[kernels] = error(loss, value), error(grad, gradient)
    for ours, torchs, size in zip(errors["triton"], errors["eager"], (value, gradient), strict=True):
        assert ours <= 1.5 * torchs + 1e-6 * np.abs(size).max(), errors


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_second_run_gives_the_same_bits(monkeypatch, device, name):
    pair = [x.detach().to(device) for x in make_logits(seed=2, width=WIDTH)]
    first, second = (loss_and_gradient(monkeypatch, "triton", name, pair, 1.0) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("change", EXTREME.values(), ids=EXTREME)
def test_extremes_are_those_of_torch(monkeypatch, device, change, name):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(512, generator=generator).mul_(4) for _ in range(2))
    change(x, y)
    pair = [x[None, None].to(device), y[None, None].to(device)]
    found = [loss_and_gradient(monkeypatch, kernels, name, pair, 1.0) for kernels in ("triton", "eager")]
    rounding = 6e-4 if 1000 < x.max() < 3000 else 1e-5  # torch rounds a log-sum-exp of 2000 in fp32
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=rounding, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(REHEARSAL, reason="needs the memory of a GPU")
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_rows_beyond_two_to_the_31_elements_are_addressed(monkeypatch, device, name):
    rows = 2**31 // WIDTH + 64
    if torch.cuda.get_device_properties(device).total_memory < 8 * 2 * rows * WIDTH:
        pytest.skip("needs 35 GB")
    generator = torch.Generator(device).manual_seed(3)
    pair = [
        torch.empty(rows, 1, WIDTH, device=device, dtype=torch.bfloat16).normal_(std=4, generator=generator)
        for _ in range(2)
    ]
    loss, grad = loss_and_gradient(monkeypatch, "triton", name, pair, 1.0)
    last = [x[-32:].clone() for x in pair]
    del pair
    expected, expected_grad = loss_and_gradient(monkeypatch, "triton", name, last, 1.0)
    assert torch.equal(loss[-32:], expected) and torch.equal(grad[-32:], expected_grad)


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "top 20"])
def test_fused_linear_is_exact(device, name, masked):
    heads, targets = make_heads(), make_targets(masked)
    loss = of(name, temperature=2.0, factor=4.0, lm_weight=0.3, logits_weight=0.7)
    expected = oracle(name, *heads, *targets, loss)
    leaves = [x.detach().to(device).requires_grad_() for x in heads[0][:3]]
    teacher = [x.to(device) for x in heads[1][:3]]
    found = fused_linear_losses(Head(*leaves), Head(*teacher), *(x.to(device) for x in targets), loss)
    found.total.backward()
    for key, x in {"lm": found.lm, "logits": found.logits}.items():
        assert relative(x.cpu(), expected[key]) < 1e-5, key
    for key, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
        assert relative(leaf.grad.cpu(), expected[key]) < 1e-5, key


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_fused_linear_in_bf16_is_no_worse_than_torch(monkeypatch, device, name):
    """Errors of the gradients against fp64 are compared with those of torch's own operations on the same loss."""
    heads, targets = make_heads(FP32 if REHEARSAL else torch.bfloat16, bias=False), make_targets()
    loss = of(name, lm_weight=0.3, chunk_tokens=None)
    expected, errors = oracle(name, *heads, *targets, loss), {}
    for kernels in ("triton", "eager"):
        use(monkeypatch, kernels)
        student = Head(*(x.detach().to(device).requires_grad_() for x in heads[0][:2]))
        teacher = Head(*(x.to(device) for x in heads[1][:2]))
        fused_linear_losses(student, teacher, *(x.to(device) for x in targets), loss).total.backward()
        grads = {"hidden": student.hidden_NH.grad.cpu(), "weight": student.weight_vH.grad.cpu()}
        errors[kernels] = {key: relative(grad, expected[key]) for key, grad in grads.items()}
    for key in errors["eager"]:
        assert errors["triton"][key] <= 1.5 * errors["eager"][key] + 1e-5, errors


@pytest.mark.skipif(REHEARSAL, reason="mamba_ssm needs a GPU")
@pytest.mark.parametrize(("dtype", "allowed"), [(FP32, 5e-3), (torch.bfloat16, 3e-2)], ids=str)  # fp32 as TF32
def test_mamba_by_kernel_is_that_of_torch(device, dtype, allowed):
    pytest.importorskip("mamba_ssm")
    pytest.importorskip("causal_conv1d")
    from distill_nemo.config import ParallelismConfig, StudentConfig
    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.process_groups import process_group_of_one
    from distill_nemo.runtime.seed import seed_everything

    own = {"hybrid_override_pattern": "M", "mamba_num_heads": 8, "n_groups": 2, "ssm_state_size": 64}
    sizes = {"num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "num_attention_heads": 2, "vocab_size": 512}
    with process_group_of_one():
        seed_everything(0)
        student = StudentConfig(family="nemotron_h", family_fields=own, **sizes)
        built = model_provider(student=student, parallelism=ParallelismConfig(), dtype=dtype).to(device)
        mixer = built.decoder.layers[0].self_attention
        projected = torch.randn(2, 300, sum(mixer.own.projected), device=device, dtype=dtype, requires_grad=True)
        found = []
        for mix in (mixer._mix_by_kernel, mixer._mix):
            output = mix(projected)
            wanted = [projected, *(weight for name, weight in mixer.named_parameters() if "_proj" not in name)]
            found.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= allowed * theirs.norm()

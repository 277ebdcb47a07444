"""KL from hidden states, forward and backward: `python -m benchmarks.fused_linear` writes results/fused_linear_*.json.

Inputs are hidden states and output weights of student and teacher in bf16, or in fp32 on a CPU whose bf16 products are
slower. Outputs are the gradients of the student's hidden states and of its weight, which is added to an fp32
`main_grad` as Megatron's DDP does. A machine with a GPU measures the shape for GPUs, others the one for CPU.
"""

import argparse
import functools
import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kl import modelopt, ours
from benchmarks.measure import interleaved, peak_bytes, write_result
from distill_nemo.losses.divergences import choose_divergence
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head
from distill_nemo.losses.fused_linear.loss import fused_linear_losses
from distill_nemo.runtime.device import setup_device

Way = Callable[["Inputs"], None]
OURS, UNFUSED, MODELOPT, PRODUCTS = "distill-nemo", "matmuls + our KL", "matmuls + ModelOpt's KL", "matmuls"


@dataclass(frozen=True)
class Shape:
    """Number of tokens N, widths of student and teacher, and vocabulary V."""

    tokens: int
    student_width: int
    teacher_width: int
    vocabulary: int

    @property
    def flops(self) -> int:
        """Operations of both models' logits and of the student's two gradients."""
        return 2 * self.tokens * self.vocabulary * (3 * self.student_width + self.teacher_width)


CPU_SHAPE = Shape(2048, 1024, 2048, 128256)
GPU_SHAPE = Shape(8192, 4096, 4096, 128256)


@dataclass(frozen=True)
class Inputs:
    """Tensors of the student, which need gradients, and of the teacher."""

    student: Head
    teacher: Head
    labels_N: Tensor
    main_grad_vH: Tensor


def main() -> None:
    """Measure the shapes for this machine and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1, help="a pass of the CPU row takes 20 to 50 s on two cores")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores; fewer take too long")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "HS", "HT", "V"), help="another shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup_device()
    gpu = torch.cuda.is_available()
    shape = Shape(*arguments.shape) if arguments.shape else GPU_SHAPE if gpu else CPU_SHAPE
    ways = {OURS: fused, UNFUSED: functools.partial(unfused, ours), MODELOPT: functools.partial(unfused, modelopt())}
    others = {PRODUCTS: products} | liger() if gpu else {}
    repeats = max(arguments.repeats, 10 if gpu else 1)
    row = compare(shape, repeats, ways | others)
    result = {"repeats": repeats, "rows": [row], "scaling": scaling(shape, max(repeats, 3))}
    if arguments.shape:
        print(json.dumps(result, indent=1))
    else:
        write_result(f"fused_linear_{'gpu' if gpu else 'cpu'}", result)


def compare(shape: Shape, repeats: int, ways: dict[str, Way]) -> dict[str, Any]:
    """Return seconds, and peak bytes beyond inputs, `main_grad` and the hidden states' gradient."""
    inputs, memory = make_inputs(shape), {}
    hidden = inputs.student.hidden_NH
    few = make_inputs(Shape(8, shape.student_width, shape.teacher_width, 128))
    for way in ways.values():
        step(way, few)  # compiles; a pass of the shape itself would take too long for that

    def measured(name: str) -> None:
        hidden.grad = inputs.student.weight_vH.grad = None
        gc.collect()
        memory[name] = peak_bytes(functools.partial(step, ways[name], inputs)) - hidden.nbytes

    if hidden.is_cuda:  # a pass takes no longer than collecting garbage does
        for name in ways:
            measured(name)
        runs = {name: functools.partial(step, way, inputs) for name, way in ways.items()}
    else:
        runs = {name: functools.partial(measured, name) for name in ways}
    found = interleaved(runs, repeats, warm=True)
    for name in ways:
        found[name]["extra_bytes"] = memory[name]
    sizes = {"tokens": shape.tokens, "widths": [shape.student_width, shape.teacher_width]}
    return sizes | {"vocabulary": shape.vocabulary, "dtype": str(hidden.dtype)[6:], "flops": shape.flops, "ways": found}


def scaling(shape: Shape, repeats: int) -> dict[str, dict[str, float]]:
    """Measure ours at a quarter of tokens and vocabulary and half of the widths, then with each of them doubled."""
    tokens, vocabulary = shape.tokens // 4, shape.vocabulary // 4
    once = Shape(tokens, shape.student_width // 2, shape.teacher_width // 2, vocabulary)
    wider = replace(once, student_width=shape.student_width, teacher_width=shape.teacher_width)
    sizes = {
        "once": once,
        "tokens": replace(once, tokens=2 * tokens),
        "widths": wider,
        "vocabulary": replace(once, vocabulary=2 * vocabulary),
    }
    runs = {name: functools.partial(step, fused, make_inputs(each)) for name, each in sizes.items()}
    for run in runs.values():
        run()
    found = interleaved(runs, repeats, warm=True)
    return {name: found[name] | {"flops": sizes[name].flops} for name in sizes}


def make_inputs(shape: Shape) -> Inputs:
    """Return inputs whose logits are about 4."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if low else torch.float32

    def head(width: int) -> Head:
        sizes = (shape.tokens, width), (shape.vocabulary, width)
        hidden, weight = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
        return Head(hidden, weight.mul_(4 / width**0.5))

    student, teacher = head(shape.student_width), head(shape.teacher_width)
    leaf = Head(student.hidden_NH.requires_grad_(), student.weight_vH.requires_grad_())
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    return Inputs(leaf, teacher, labels, torch.zeros_like(leaf.weight_vH, dtype=torch.float32))


def step(way: Way, inputs: Inputs) -> None:
    """Run a forward and a backward pass."""
    inputs.student.hidden_NH.grad = inputs.student.weight_vH.grad = None
    way(inputs)


def fused(inputs: Inputs) -> None:
    """Compute the loss as the training loop does, LM loss included."""
    weight: Any = inputs.student.weight_vH
    weight.main_grad = inputs.main_grad_vH
    mask_N = torch.ones(len(inputs.labels_N), device=weight.device)
    loss = FusedLoss(choose_divergence("forward_kl"))
    fused_linear_losses(inputs.student, inputs.teacher, inputs.labels_N, mask_N, loss).total.backward()


def unfused(loss: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> None:
    """Compute whole logits, then a loss of them."""
    teacher = inputs.teacher.hidden_NH[:, None] @ inputs.teacher.weight_vH.T
    student = inputs.student.hidden_NH[:, None] @ inputs.student.weight_vH.T
    total = loss(student, teacher).sum()
    del student, teacher
    total.backward()
    _as_ddp(inputs)


def products(inputs: Inputs) -> None:
    """Compute the matrix products alone."""
    student, weight = (x.detach() for x in inputs.student[:2])
    logits = student @ weight.T
    inputs.teacher.hidden_NH @ inputs.teacher.weight_vH.T
    inputs.student.hidden_NH.grad, inputs.student.weight_vH.grad = logits @ weight, logits.T @ student


def liger() -> dict[str, Way]:
    """Return Liger's fused losses, if installed (`pip install liger-kernel`); beta 0 is KL(teacher || student)."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return {}

    chunked: Any = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    jsd = LigerFusedLinearJSD(jsd_beta=0.0)

    def fused_jsd(inputs: Inputs) -> None:
        (s, w, _), (t, u, _) = inputs.student, inputs.teacher
        jsd(s, w, t, u, None).backward()
        _as_ddp(inputs)

    def chunked_distillation(inputs: Inputs) -> None:
        (s, w, _), (t, u, _) = inputs.student, inputs.teacher
        chunked(s, w, t, u, inputs.labels_N).backward()
        _as_ddp(inputs)

    return {"Liger fused_linear_jsd": fused_jsd, "Liger chunked distillation": chunked_distillation}


def _as_ddp(inputs: Inputs) -> None:
    """Add the gradient to `main_grad`, as the hook of Megatron's DDP does."""
    assert inputs.student.weight_vH.grad is not None
    inputs.main_grad_vH.add_(inputs.student.weight_vH.grad)
    inputs.student.weight_vH.grad = None


if __name__ == "__main__":
    main()

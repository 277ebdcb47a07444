"""Choose the kernels for a rank's own part of a loss: Triton on a GPU, compiled C on CPU, else plain torch.

A kernel replaces a torch function with the same arguments and results. It passes the same tests, and returns the same
bits in every run.
"""

import os
from collections.abc import Callable
from functools import cache

from torch import Tensor

from distill_nemo.losses.kernels import cpu_kernels, eager

VARIABLE = "DISTILL_NEMO_KERNELS"  # "eager", "c", or "triton" (on CPU with TRITON_INTERPRET=1 only); unset: the fastest
Kernel = Callable[..., Tensor]


def choose_kernels(*tensors: Tensor) -> str:
    """Return "triton", "c" or "eager" (torch) for these tensors: all logits, and the output of the gradient."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "eager", "c", "triton"):
        raise ValueError(f'{VARIABLE} is "{wanted}"; leave it unset, or set it to eager, c or triton')
    if wanted == "triton" or (wanted == "" and tensors[0].is_cuda):
        return "triton" if _triton_kernels() else "eager"
    return "c" if wanted != "eager" and cpu_kernels.can_take(*tensors) else "eager"


def find_kernel(name: str, *tensors: Tensor) -> Kernel | None:
    """Return the kernel of this name for these tensors, or None if torch must compute."""
    kernels = {"triton": _triton_kernels, "c": lambda: cpu_kernels.KERNELS, "eager": dict}[choose_kernels(*tensors)]()
    return kernels.get(name)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """Compute `eager.kl_statistics` with the fastest kernel."""
    pair = p_logits_SBv, q_logits_SBv
    return (find_kernel("kl_statistics", *pair) or eager.kl_statistics)(*pair, temperature)


def softmax_gradient(
    logits_nv: Tensor,
    temperature: float,
    peak_n: Tensor,
    scale_n: Tensor,
    second: tuple[Tensor, Tensor] | None,
    column_nK: Tensor,
    value_nK: Tensor,
    out_nv: Tensor,
) -> Tensor:
    """Compute `eager.softmax_gradient` with the fastest kernel."""
    compute = find_kernel("softmax_gradient", logits_nv, out_nv) or eager.softmax_gradient
    return compute(logits_nv, temperature, peak_n, scale_n, second, column_nK, value_nK, out_nv)


@cache
def _triton_kernels() -> dict[str, Kernel]:
    try:
        from distill_nemo.losses.kernels.triton_kernels import KERNELS
    except ImportError:  # torch without Triton
        return {}
    return KERNELS

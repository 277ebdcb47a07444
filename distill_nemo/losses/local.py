"""Which code computes a rank's own part of a loss: Triton on a GPU, compiled C on CPU, or plain torch.

All three have the functions of `eager.py` (Triton's gradients with one argument more, see `ONE_PASS` there), pass the
same tests, and give the same bits whenever they run again.
"""

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from distill_nemo.losses import cpu_kernels, eager

# Says which, where it can run: "eager", "c", "triton" (on CPU with TRITON_INTERPRET=1 only). Unset: the fastest.
VARIABLE = "DISTILL_NEMO_KERNELS"


def implementation(*logits_SBv: Tensor) -> ModuleType:
    """The module whose functions to call for these logits."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "eager", "c", "triton"):
        raise ValueError(f'{VARIABLE} is "{wanted}"; leave it unset, or say eager, c or triton')
    if wanted == "triton" or (wanted == "" and logits_SBv[0].is_cuda):
        return _triton() or eager
    if wanted != "eager" and cpu_kernels.can_take(*logits_SBv):
        return cpu_kernels
    return eager


def gradient_buffer(logits_SBv: Tensor, overwrite: bool) -> Tensor:
    """Where to write the gradient: over the logits themselves, if told to and their rows lie one after the other.

    Autograd is told, so a backward that still needs those logits raises rather than read a gradient.
    """
    if overwrite and logits_SBv.is_contiguous():
        torch.autograd.graph.increment_version(logits_SBv)
        return logits_SBv
    return logits_SBv.new_empty(logits_SBv.shape)


@cache
def _triton() -> ModuleType | None:
    try:
        from distill_nemo.losses import triton_kernels
    except ImportError:  # torch without Triton
        return None
    return triton_kernels

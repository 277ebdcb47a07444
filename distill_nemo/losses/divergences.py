"""The divergences a logit loss can be made of, by the name used in configs. Never a bare "kl".

Each takes `(student_logits_SBv, teacher_logits_SBv, temperature, group)` and returns [S, B] fp32; `choose` binds what
some take besides. A new one is one file with function and gradient, one line here, and one fp64 oracle in the tests.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.cross_entropy import CrossEntropy, add_cross_entropy_gradient
from distill_nemo.losses.jensen_shannon import jensen_shannon_steps, vocab_parallel_jensen_shannon
from distill_nemo.losses.local import implementation
from distill_nemo.losses.reverse_kl import reverse_kl_steps, vocab_parallel_reverse_kl
from distill_nemo.losses.top_k import top_k_gradient, top_k_steps, vocab_parallel_top_k_forward_kl
from distill_nemo.losses.vocab_parallel import Steps, forward_kl_steps, vocab_parallel_forward_kl

Divergence = Callable[..., Tensor]


class Parts(NamedTuple):
    """A divergence in two halves, for who has the logits of a few tokens at a time (`fused_linear.py`)."""

    steps: Callable[[Tensor, Tensor, float], Steps]  # of student and teacher logits, and temperature
    # Of fp32 student and teacher logits, the numbers of `steps`, the gradient of each token's loss and temperature, and
    # with that of the LM loss where there is one. The result is written over the teacher's logits or, by a kernel that
    # can, in the dtype given last; the student's may be overwritten too.
    gradient: Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor, float, CrossEntropy | None, torch.dtype], Tensor]


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": vocab_parallel_forward_kl,  # KL(teacher || student)
    "reverse_kl": vocab_parallel_reverse_kl,  # KL(student || teacher)
    "jensen_shannon": vocab_parallel_jensen_shannon,  # beta KL(teacher || m) + (1 - beta) KL(student || m)
}


def choose(
    name: str, beta: float = 0.5, top_k: int | None = None, overwrite_student_logits: bool = False
) -> Divergence:
    """The divergence of this name, to be called with the four arguments above.

    Args:
        name: a key of `DIVERGENCES`.
        beta: the teacher's share of the mixture m, for jensen_shannon; the others do not look at it.
        top_k: with forward_kl, the number of tokens known of the teacher, all others being one bucket; None: all.
        overwrite_student_logits: see `vocab_parallel_forward_kl`; with top_k nothing is overwritten.

    Raises:
        ValueError: for an unknown name, a beta that jensen_shannon cannot take, or a top_k that is no positive int or
            comes with another divergence.
    """
    if name not in DIVERGENCES:
        raise ValueError(f'divergence "{name}" is not known; choose one of: {", ".join(DIVERGENCES)}')
    if top_k is not None:
        if name != "forward_kl":
            raise ValueError(f'top_k goes with divergence "forward_kl" only, got "{name}"; leave top_k at None')
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k must be an int of at least 1, or None for the whole vocabulary, got {top_k!r}")
        return partial(vocab_parallel_top_k_forward_kl, top_k=top_k)
    if name == "jensen_shannon":
        if not 0 < beta < 1:
            raise ValueError(f"beta must lie between 0 and 1, both excluded, got {beta}: use forward_kl or reverse_kl")
        return partial(vocab_parallel_jensen_shannon, beta=beta, overwrite_student_logits=overwrite_student_logits)
    return partial(DIVERGENCES[name], overwrite_student_logits=overwrite_student_logits)


def choose_parts(
    name: str, beta: float = 0.5, top_k: int | None = None, group: dist.ProcessGroup | None = None
) -> Parts:
    """The divergence that `choose` would give for these, in its halves.

    Raises:
        ValueError: as `choose`.
    """
    choose(name, beta, top_k)
    if top_k is not None:
        rank = 0 if group is None else dist.get_rank(group)
        return Parts(partial(top_k_steps, top_k=top_k, rank=rank), partial(_gradient, _top_k, {}))
    if name == "jensen_shannon":
        steps, more = partial(jensen_shannon_steps, beta=beta), {"beta": beta}
    else:
        steps, more = {"forward_kl": forward_kl_steps, "reverse_kl": reverse_kl_steps}[name], {}
    return Parts(steps, partial(_gradient, partial(_kernel, f"{name}_gradient"), more))


def _gradient(
    find: Callable[[Tensor, Tensor], tuple[Callable[..., None], bool]],
    more: dict[str, float],
    z: Tensor,
    t: Tensor,
    numbers: tuple[Tensor, ...],
    grad: Tensor,
    temperature: float,
    lm: CrossEntropy | None,
    dtype: torch.dtype,
) -> Tensor:
    write, one_pass = find(z, t)
    out = torch.empty_like(t, dtype=dtype) if one_pass and dtype != t.dtype else t
    write(z, t, *numbers, grad, temperature, **more, **({"lm": lm} if one_pass else {}), out_SBv=out)
    if lm is not None and not one_pass:
        add_cross_entropy_gradient(z, lm, out)
    return out


def _kernel(name: str, z: Tensor, t: Tensor) -> tuple[Callable[..., None], bool]:
    """The function of this name for these logits, and its module's `ONE_PASS`."""
    kernels = implementation(z, t)
    return getattr(kernels, name), kernels.ONE_PASS


def _top_k(*_: Tensor) -> tuple[Callable[..., None], bool]:
    return lambda z, t, *numbers, **more: top_k_gradient(z, *numbers, **more), False

"""The divergences a logit loss can be made of, by the name used in configs. Never a bare "kl".

Each takes `(student_logits_SBv, teacher_logits_SBv, temperature, group)` and returns [S, B] fp32; `choose` binds what
some take besides. A new one is one file with function and gradient, one line here, and one fp64 oracle in the tests.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from distill_nemo.losses.jensen_shannon import vocab_parallel_jensen_shannon
from distill_nemo.losses.reverse_kl import vocab_parallel_reverse_kl
from distill_nemo.losses.top_k import vocab_parallel_top_k_forward_kl
from distill_nemo.losses.vocab_parallel import vocab_parallel_forward_kl

Divergence = Callable[..., Tensor]

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

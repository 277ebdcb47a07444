"""The divergences by name. A new one is one function, one entry here and one fp64 oracle in tests/reference.py."""

from collections.abc import Callable

from torch import Tensor

from distill_nemo.losses.vocab_parallel import Group, vocab_parallel_forward_kl

Divergence = Callable[[Tensor, Tensor, float, Group], Tensor]

DIVERGENCES: dict[str, Divergence] = {"forward_kl": vocab_parallel_forward_kl}

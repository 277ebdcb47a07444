"""One file per divergence, under the name that configs use. A file whose name begins with _ is no choice of its own.

A new divergence is its file here, with one class, its fp64 oracle in tests/reference.py, and its row in
docs/semantics.md.
"""

import pkgutil
from dataclasses import fields
from importlib import import_module

from distill_nemo.losses.divergence import Divergence
from distill_nemo.losses.divergences._top_k import TopKForwardKL


def _divergence_of(name: str) -> type[Divergence]:
    """Return the class that this file defines."""
    module = import_module(f"{__name__}.{name}")
    found = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    (divergence,) = (x for x in found if issubclass(x, Divergence))
    return divergence


NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
DIVERGENCES = {name: _divergence_of(name) for name in NAMES}


def choose_divergence(name: str, temperature: float = 1.0, beta: float = 0.5, top_k: int | None = None) -> Divergence:
    """Return the divergence of this name.

    Args:
        name: a key of `DIVERGENCES`. Never a bare "kl".
        temperature: T > 0, divides the logits of both sides.
        beta: the teacher's share of the mixture m, for jensen_shannon; other divergences ignore it.
        top_k: with forward_kl, the number of the teacher's tokens that are known, with one bucket for the others;
            None: all.

    Raises:
        ValueError: for an unknown name, a value out of range, or a top_k beside another divergence than forward_kl.
    """
    if name not in DIVERGENCES:
        raise ValueError(f'divergence "{name}" is not known; choose one of: {", ".join(DIVERGENCES)}')
    if top_k is not None:
        if name != "forward_kl":
            raise ValueError(f'top_k goes with divergence "forward_kl" only, got "{name}"; leave top_k at None')
        return TopKForwardKL(temperature, top_k)
    wanted = {each.name for each in fields(DIVERGENCES[name])}
    settings = {"temperature": temperature, "beta": beta}
    return DIVERGENCES[name](**{field: value for field, value in settings.items() if field in wanted})

"""The divergences a logit loss can be made of, by the name used in configs. Never a bare "kl".

Each takes `(student_logits_SBv, teacher_logits_SBv, temperature, group)` and returns [S, B] fp32. A new one is one
function with its gradient in `vocab_parallel.py`, one line here, and one fp64 oracle in the tests.
"""

from collections.abc import Callable

from torch import Tensor

from distill_nemo.losses.vocab_parallel import vocab_parallel_forward_kl

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": vocab_parallel_forward_kl,  # KL(teacher || student)
}

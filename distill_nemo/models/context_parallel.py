"""Context parallelism where Transformer Engine does not run: every rank holds two pieces of the sequence.

The sequence is cut in 2*cp pieces; context-parallel rank r holds pieces r and 2*cp-1-r (Megatron's zig-zag: the causal
mask then gives every rank the same work).
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor


def split_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's two pieces of every tensor.

    Args:
        batch: tensors [B, S]; every context-parallel rank has the same. It is left as it is.

    Returns:
        tensors [B, S/cp]; the batch itself without context parallelism.

    Raises:
        ValueError: when 2*cp does not divide S.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    for name, tensor in batch.items():
        if tensor.shape[1] % (2 * size):
            raise ValueError(
                f"data.sequence_length: {name} has {tensor.shape[1]} tokens a sample, which must be divisible by "
                f"2 * parallelism.context_parallel_size = {2 * size}"
            )
    group: Any = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)

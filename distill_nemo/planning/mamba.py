"""Bytes and operations of Mamba-2 mixers.

On a GPU the kernel of mamba_ssm saves what it is given and the scan's output, and computes the rest again. On a CPU the
bytes are those of `models/layers/state_space.py`, as observed.
"""

from distill_nemo.models.architecture import Architecture, Mamba
from distill_nemo.planning.planned import PlannedRun


def _own(planned: PlannedRun, model: Architecture) -> tuple[Mamba, int]:
    """Return the sizes on one tensor-parallel rank, and the tokens of a chunk."""
    assert model.mamba is not None
    own = model.mamba.share(planned.config.parallelism.tensor_model_parallel_size)
    return own, min(own.chunk_size, planned.config.data.sequence_length)


def saved_by_mamba(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes that a mixer saves for backward in one micro batch, without its norm."""
    own, chunk = _own(planned, model)
    projected, convolved = sum(own.projected), sum(own.convolved)
    if planned.on_gpu:
        return planned.tokens * (planned.item * (projected + 2 * own.channels) + 4 * own.num_groups)
    of_groups = 4 * own.num_groups * own.state_size
    states = 2 * own.channels * own.state_size // chunk
    scores = chunk * (2 * own.num_heads + own.num_groups)
    scan = 8 * own.channels + of_groups + states + scores + 4 * own.num_heads  # in fp32
    return planned.tokens * (planned.item * (projected + 3 * convolved + own.channels) + 4 * scan)


def forward_workspace_of_mamba(planned: PlannedRun, model: Architecture) -> int:
    """Return the peak bytes of a mixer's forward pass if nothing is saved."""
    own, chunk = _own(planned, model)
    projected, convolved, heads, channels = sum(own.projected), sum(own.convolved), own.num_heads, own.channels
    states, scores = channels * own.state_size // chunk, chunk * own.num_groups
    if planned.on_gpu:
        return planned.tokens * (planned.item * (2 * projected + convolved + 2 * channels) + 4 * (2 * states + scores))
    scan = 2 * channels + 2 * own.num_groups * own.state_size + 3 * heads + 2 * chunk * heads + scores
    scan += max(2 * chunk * heads + 2 * channels, 4 * channels + 4 * states)
    return planned.tokens * (planned.item * (2 * projected + convolved) + 4 * scan)


def backward_workspace_of_mamba(planned: PlannedRun, model: Architecture) -> int:
    """Return the peak bytes of a mixer's backward pass beyond its saved tensors."""
    own, chunk = _own(planned, model)
    if planned.on_gpu:
        states = own.channels * own.state_size // chunk
        numbers = sum(own.projected) + sum(own.convolved) + 3 * own.channels
        return planned.tokens * (planned.item * numbers + 4 * 2 * states)
    return planned.tokens * 4 * max(7 * own.channels // 2, 2 * chunk * own.num_heads - 6 * own.channels)


def mamba_flops(model: Architecture, length: int) -> float:
    """Return a mixer's forward operations per token of a sequence of `length`.

    They are those of two linear layers, the convolution, and the scan: in each chunk, scores of all pairs of tokens,
    their product with x, and the products that write the state and read it.
    """
    own = model.mamba
    assert own is not None
    chunk = min(own.chunk_size, length)
    linear = 2 * model.hidden_size * (sum(own.projected) + own.channels)
    scan = 2 * chunk * (own.num_groups * own.state_size + own.channels) + 4 * own.channels * own.state_size
    return linear + 2 * own.conv_kernel * sum(own.convolved) + scan

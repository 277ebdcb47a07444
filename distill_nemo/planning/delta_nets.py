"""Bytes and operations of a gated delta net, for a micro batch on a tensor-parallel rank.

In bf16 on a GPU flash-linear-attention computes it; elsewhere torch does, in fp32 (`models/layers/delta_rule.py`). The
numbers of tensors are those that both save, and an inverse of 64 rows for each chunk of 64 tokens.
"""

from dataclasses import dataclass

from distill_nemo.models.architecture import Architecture, DeltaNet
from distill_nemo.planning.planned import PlannedRun

CHUNK = 64  # tokens


@dataclass(frozen=True)
class DeltaNetSizes:
    """Channels on a rank.

    Args:
        heads: value heads.
        queries: queries, or keys, repeated for every value head.
        values: values.
        convolved: queries, keys and values before they are repeated.
        state: numbers of the states of all heads.
    """

    heads: int
    queries: int
    values: int
    convolved: int
    state: int

    @property
    def projected(self) -> int:
        """Outputs of the first product: with gates, and two numbers for each head."""
        return self.convolved + self.values + 2 * self.heads


def delta_net_sizes(model: Architecture, tensor: int = 1) -> DeltaNetSizes:
    """Return the sizes on one of `tensor` ranks."""
    net = model.delta_net
    assert isinstance(net, DeltaNet)
    heads = net.linear_num_value_heads // tensor
    values = net.value_channels // tensor
    return DeltaNetSizes(
        heads=heads,
        queries=heads * net.linear_key_head_dim,
        values=values,
        convolved=2 * net.key_channels // tensor + values,
        state=values * net.linear_key_head_dim,
    )


def saved_by_delta_net(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes that a delta net saves for backward, without the norm before it."""
    sizes = delta_net_sizes(model, planned.config.parallelism.tensor_model_parallel_size)
    if planned.transformer_engine:
        numbers = 2 * sizes.convolved + 2 * sizes.queries + 4 * sizes.values + CHUNK * sizes.heads
        return planned.tokens * (planned.item * numbers + 8 * sizes.heads)
    each = (5 * CHUNK + 9) * sizes.heads + 11.5 * sizes.queries + 9 * sizes.values + 2 * sizes.state / CHUNK
    return int(4 * _whole_chunks(planned) * each) + 2 * planned.item * planned.tokens * sizes.convolved


def delta_net_workspace(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes that a delta net needs besides in a forward pass, and at least in a backward pass."""
    sizes = delta_net_sizes(model, planned.config.parallelism.tensor_model_parallel_size)
    projected = planned.item * planned.tokens * sizes.projected
    if planned.transformer_engine:
        return projected + planned.item * planned.tokens * 2 * (sizes.queries + sizes.values)
    return projected + 4 * _whole_chunks(planned) * 3 * CHUNK * sizes.heads  # exponents of decays are fp64


def delta_net_flops(model: Architecture) -> float:
    """Return forward operations per token: products with weights, the convolution, and the rule by chunks.

    In a chunk, keys with keys and queries with keys make matrices, a triangular system gives the values to write, and
    the scores multiply those. Three products are with the states.
    """
    sizes, net = delta_net_sizes(model), model.delta_net
    assert net is not None
    weights = 2 * model.hidden_size * (sizes.projected + sizes.values)
    convolution = 2 * net.linear_conv_kernel_dim * sizes.convolved
    return weights + convolution + CHUNK * (5 * sizes.queries + 3 * sizes.values) + 6 * sizes.state


def _whole_chunks(planned: PlannedRun) -> int:
    """Return the tokens of a micro batch on a rank, with those that fill up the last chunk."""
    length = planned.config.data.sequence_length
    return planned.tokens * -(-length // CHUNK) * CHUNK // length

"""RMSNorm of queries or keys over all heads together, as in OLMo 2, under tensor parallelism."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class WideRMSNorm(MegatronModule):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the channels of all heads, in fp32.

    Every tensor-parallel rank holds the channels of its own heads and their weights. The mean runs over the channels of
    all ranks. Shapes: S tokens, B samples, n heads of this rank, d channels of a head.
    """

    def __init__(self, config: TransformerConfig, num_heads: int) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None, "Megatron fills it"
        self.channels = num_heads * config.kv_channels
        own = self.channels // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.ones(own, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBnd: Tensor) -> Tensor:
        """Return the normalised input, in its shape and dtype.

        Collectives: an all-reduce over the tensor-parallel group in forward, and one in backward.
        """
        x = x_SBnd.float().flatten(2)
        squares = reduce_from_tensor_model_parallel_region(x.square().sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)  # every rank's output depends on it
        x = x * torch.rsqrt(squares / self.channels + self.config.layernorm_epsilon)
        return (self.weight * x).to(x_SBnd.dtype).view_as(x_SBnd)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Mark the weight as a shard. Megatron would take a norm's weight to be the same on all ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def give_wide_norms(built: GPTModel) -> None:
    """Give the attention of each layer its norms.

    Megatron would build them for one head, and sum the gradients of `qk_layernorm` over tensor-parallel ranks.
    """
    for layer in built.decoder.layers:
        assert isinstance(layer, TransformerLayer)
        attention = layer.self_attention
        if isinstance(attention, SelfAttention):
            config = attention.config
            assert config.num_query_groups is not None
            attention.q_layernorm = WideRMSNorm(config, config.num_attention_heads)
            attention.k_layernorm = WideRMSNorm(config, config.num_query_groups)

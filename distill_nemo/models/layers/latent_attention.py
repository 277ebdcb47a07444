"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a token's keys and values come from one narrow vector.

Shapes: s tokens of this context-parallel rank, t = s, or s/tp under sequence parallelism, B samples, H width, n heads
of this tensor-parallel rank, r channels of a head's queries and keys that are rotated, u that are not, d = r + u,
v channels of its values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional

from distill_nemo.models.architecture import Latent
from distill_nemo.models.layers.context_parallel import CausalAttention
from distill_nemo.models.layers.norms import RMSNorm

Build = Callable[..., Any]  # of a module; Megatron types Transformer Engine's as interfaces
NORM_EPSILON = 1e-6  # of the latents, whatever rms_norm_eps says: transformers' DeepSeek-V3 and GLM-4.7-Flash


@dataclass
class LatentAttentionSubmodules:
    """Classes that differ with Transformer Engine; `linear_proj` and `core_attention` as `Attention` reads them."""

    linear_up: Build
    linear_proj: Build
    core_attention: Build
    norm: Build


class LatentAttention(Attention):
    """Attention whose queries, keys and values are projections of normalised latents.

    ```
    query = q_up(norm(q_down(x)))          # n heads of [u, r] channels; without a latent, q_proj(x)
    latent, rotated = kv_down(x)           # r channels of the key, which all heads share
    key, value = kv_up(norm(latent))       # n heads of [u, v] channels
    attend([rope(query_r), query_u], [rope(rotated), key], value)
    ```

    The down projections are the same on every tensor-parallel rank; the up projections have its heads. Parameters are
    named as in Megatron's MLASelfAttention. That one, without Transformer Engine, splits the down projections too, and
    then loses the gradients that other ranks' heads send to the shared channels of the key. It also adds a norm before
    `linear_q_proj`, and gives all norms one epsilon.

    Rotated channels come first, where `Attention` rotates them: scores do not depend on the order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        sizes: Latent,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", **kwargs)  # pyright: ignore[reportArgumentType]
        self.sizes = sizes
        self.q_layernorm = self.k_layernorm = None  # of each head, in `Attention`
        heads, width, keys = config.num_attention_heads, config.hidden_size, sizes.kv_lora_rank
        assert config.kv_channels is not None, "Megatron fills it"

        def up(columns: int, channels: int) -> nn.Module:
            return submodules.linear_up(
                columns,
                heads * channels,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
            )

        def norm(channels: int) -> nn.Module:
            return submodules.norm(config=config, hidden_size=channels, eps=NORM_EPSILON)

        if sizes.q_lora_rank is None:
            self.linear_q_proj = up(width, sizes.qk_head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, width, sizes.q_lora_rank)
            self.q_layernorm = norm(sizes.q_lora_rank)
            self.linear_q_up_proj = up(sizes.q_lora_rank, sizes.qk_head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(config, width, keys + sizes.qk_rope_head_dim)
        self.kv_layernorm = norm(keys)
        self.linear_kv_up_proj = up(keys, sizes.qk_nope_head_dim + config.kv_channels)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys [s, B, n, d], not yet rotated, and values [s, B, n, v], from [t, B, H].

        Collectives: under tensor parallelism, an all-reduce in backward; under sequence parallelism, an all-gather of
        the key's shared channels, and a reduce-scatter in backward; and those of the up projections.
        """
        assert key_value_states is None and not output_gate and split_qkv, "plain self-attention only"
        sizes, n = self.sizes, self.num_attention_heads_per_partition
        query_sBnd = self._queries(hidden_states).unflatten(-1, (n, -1))
        query_sBnu, query_sBnr = query_sBnd.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        latent, shared_tBr = self.linear_kv_down_proj(hidden_states).split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1
        )
        up_sBnc = self.linear_kv_up_proj(self.kv_layernorm(latent))[0].unflatten(-1, (n, -1))
        key_sBnu, value_sBnv = up_sBnc.split([sizes.qk_nope_head_dim, self.hidden_size_per_attention_head], -1)
        shared_sBnr = self._paired(self._shared(shared_tBr)).unsqueeze(2).expand(-1, -1, n, -1)
        query_sBnd = torch.cat([self._paired(query_sBnr), query_sBnu], -1)
        return query_sBnd, torch.cat([shared_sBnr, key_sBnu], -1), value_sBnv.contiguous()

    def _queries(self, hidden_tBH: Tensor) -> Tensor:
        if self.sizes.q_lora_rank is None:
            return self.linear_q_proj(hidden_tBH)[0]
        assert self.q_layernorm is not None
        return self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_tBH)))[0]

    def _shared(self, x_tBr: Tensor) -> Tensor:
        """Give every head of all tensor-parallel ranks the same channels; their gradients are summed."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x_tBr, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(x_tBr, group=self.pg_collection.tp)

    def _paired(self, x: Tensor) -> Tensor:
        """Order the channels so that those that are rotated together lie half of them apart."""
        return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if self.sizes.rope_interleave else x


class ReplicatedLinear(nn.Module):
    """`x @ weight.T`, with the whole weight on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, columns: int, rows: int) -> None:
        super().__init__()
        weight = torch.empty(rows, columns)  # drawn in fp32 on the CPU, as Megatron draws
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(weight)
        self.weight = nn.Parameter(weight.to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # sums its gradient

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, in the dtype of the input."""
        return functional.linear(x, self.weight)


class PaddedCausalAttention(CausalAttention):
    """Causal core attention whose keys and values differ in width. Zeros make them equally wide.

    On a CPU, torch would otherwise keep all scores.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend, as `CausalAttention`. Returns [s, B, n*v]."""
        channels, width = value.shape[-1], max(key.shape[-1], value.shape[-1])
        query, key, value = (_padded(x, width) for x in (query, key, value))
        out = super().forward(query, key, value, *args, **kwargs)
        return out if width == channels else out.unflatten(-1, (-1, width))[..., :channels].flatten(2)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def latent_attention_spec(sizes: Latent, value_channels: int, use_te: bool, own_core: bool) -> tuple[ModuleSpec, Build]:
    """Return the spec of a layer's attention, and the norm before it, which is not fused into a projection.

    Args:
        sizes: of the latents and the heads.
        value_channels: of a head.
        use_te: take Transformer Engine's modules.
        own_core: take our core attention beside them, too.
    """
    submodules = LatentAttentionSubmodules(ColumnParallelLinear, RowParallelLinear, PaddedCausalAttention, RMSNorm)
    if use_te:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )

        core = partial(TEDotProductAttention, k_channels=sizes.qk_head_dim, v_channels=value_channels)
        core = PaddedCausalAttention if own_core else core
        submodules = LatentAttentionSubmodules(TEColumnParallelLinear, TERowParallelLinear, core, TENorm)
    return ModuleSpec(LatentAttention, params={"sizes": sizes}, submodules=submodules), submodules.norm

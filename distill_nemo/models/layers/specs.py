"""Specs of transformer layers: Transformer Engine's modules if they run, else Megatron's with our norm."""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from distill_nemo.models.architecture import Architecture, Layer
from distill_nemo.models.layers.context_parallel import CausalAttention
from distill_nemo.models.layers.gated_attention import GatedAttention
from distill_nemo.models.layers.latent_attention import latent_attention_spec
from distill_nemo.models.layers.mamba import MambaMixer, MambaSubmodules
from distill_nemo.models.layers.norms import RMSNorm


def transformer_engine_usable(dtype: torch.dtype) -> bool:
    """Return True if Transformer Engine can run here. Without CUDA it imports, but builds no module.

    In fp32 it is not used: it would multiply in TF32, and its only attention keeps all scores and has no context
    parallelism.
    """
    if not torch.cuda.is_available() or dtype == torch.float32:
        return False
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return True


def uses_transformer_engine(model: Architecture, dtype: torch.dtype) -> bool:
    """Return True if a model's layers are Transformer Engine's. ModelOpt quantises Megatron's own layers here."""
    return model.quantization is None and transformer_engine_usable(dtype)


def block_spec(
    model: Architecture, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage and the norm after the last one."""
    if isinstance(config, HeterogeneousTransformerConfig):
        return _heterogeneous_spec(model, config, vp_stage)
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage=vp_stage)
    specs = [
        ModuleSpec(module=TransformerLayer, submodules=_layer_parts(model, config, layer))
        for layer in model.layers[first : first + count]
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm(model, config.params_dtype))


def _norm(model: Architecture, dtype: torch.dtype) -> Any:
    if not uses_transformer_engine(model, dtype):
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def uses_own_attention(model: Architecture, dtype: torch.dtype) -> bool:
    """Return True if core attention is ours, not Transformer Engine's."""
    return model.needs_own_attention or not uses_transformer_engine(model, dtype)


def _layer_parts(model: Architecture, config: TransformerConfig, layer: Layer) -> TransformerLayerSubmodules:
    """Return the parts of one layer, with a part that it lacks left out."""
    num_experts = config.num_moe_experts if layer.has_experts else None
    use_te = uses_transformer_engine(model, config.params_dtype)
    if use_te:
        parts = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    else:
        parts = _local_parts(config, num_experts)
    attention = getattr(parts.self_attention, "submodules", None)
    if uses_own_attention(model, config.params_dtype) and isinstance(attention, SelfAttentionSubmodules):
        attention.core_attention = ModuleSpec(CausalAttention, params={"softcap": model.multipliers.attention_softcap})
    if layer.mixer == "mamba":
        _mix_by_mamba(parts, model, config)
    elif layer.mixer == "latent_attention":
        assert model.latent is not None
        own_core = uses_own_attention(model, config.params_dtype)
        spec = latent_attention_spec(model.latent, model.kv_channels, use_te, own_core)
        parts.self_attention, parts.input_layernorm = spec
        parts.sharded_state_dict_keys_map.pop("input_layernorm.", None)  # it is not fused with Transformer Engine
    elif layer.mixer == "gated_delta_net":
        from distill_nemo.models.layers.gated_delta_net import use_delta_net

        use_delta_net(parts, _norm(model, config.params_dtype), use_te)
    elif layer.num_query_groups is None:
        parts.input_layernorm = parts.self_attention = IdentityOp
        parts.self_attn_bda = IdentityFuncOp
    if layer.ffn_hidden_size is None:
        parts.pre_mlp_layernorm = parts.mlp = IdentityOp
        parts.mlp_bda = IdentityFuncOp
    return parts


def _mix_by_mamba(parts: TransformerLayerSubmodules, model: Architecture, config: TransformerConfig) -> None:
    linear: MambaSubmodules
    if uses_transformer_engine(model, config.params_dtype):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        linear, parts.input_layernorm = MambaSubmodules(TEColumnParallelLinear, TERowParallelLinear), TENorm
    else:
        linear = MambaSubmodules(ColumnParallelLinear, RowParallelLinear)
    parts.self_attention = ModuleSpec(module=MambaMixer, params={"sizes": model.mamba}, submodules=linear)


def _local_parts(config: TransformerConfig, num_experts: int | None) -> TransformerLayerSubmodules:
    """Return Megatron's own parts of one layer, with our norm and attention."""
    parts = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
    if num_experts is not None:  # stored under Transformer Engine's names: this norm is not fused there
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    assert isinstance(attention, SelfAttentionSubmodules)
    if config.attention_output_gate:
        parts.self_attention.module = GatedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return parts


def drop_pre_norms(block: TransformerBlockSubmodules, use_te: bool) -> None:
    """Let attention and MLP read the residual stream as it is.

    Transformer Engine fuses the dropped norms into linear layers, so those are replaced too.
    """
    for layer in block.layer_specs or []:
        parts = layer.submodules
        assert isinstance(parts, TransformerLayerSubmodules)
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        attention = getattr(parts.self_attention, "submodules", None)
        if use_te and isinstance(attention, SelfAttentionSubmodules):
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

            attention.linear_qkv = TEColumnParallelLinear
            mlp = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
            parts.mlp = partial(MLP.as_mlp_submodule, submodules=mlp)


def _heterogeneous_spec(
    model: Architecture, config: HeterogeneousTransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return Megatron's spec of layers that differ, with our norm and attention in place of its local ones.

    Documents apart need our attention beside Transformer Engine's other parts, too.
    """
    use_te = uses_transformer_engine(model, config.params_dtype)
    block = get_gpt_heterogeneous_layer_spec(config, use_te=use_te, vp_stage=vp_stage)
    assert block.layer_specs is not None
    for layer in block.layer_specs:
        assert isinstance(layer.submodules, TransformerLayerSubmodules)
        attention = getattr(layer.submodules.self_attention, "submodules", None)
        if uses_own_attention(model, config.params_dtype) and isinstance(attention, SelfAttentionSubmodules):
            attention.core_attention = CausalAttention
        for part in (layer.submodules, attention):
            for name, module in list(vars(part).items()) if part else ():
                if module is WrappedTorchNorm:
                    setattr(part, name, RMSNorm)
    block.layer_norm = RMSNorm if block.layer_norm is WrappedTorchNorm else block.layer_norm
    return block

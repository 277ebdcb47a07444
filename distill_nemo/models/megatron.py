"""Build Megatron's config and model of an architecture at a parallel layout."""

import json
import logging
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from torch.nn import functional
from torch.nn.init import zeros_

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import FUSED_ACTIVATIONS, Architecture, padded_vocab_size
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.layers.block_configs import write_block_configs
from distill_nemo.models.layers.experts import clone_expert_outputs, expert_settings
from distill_nemo.models.layers.mamba import fused_kernel
from distill_nemo.models.layers.multipliers import FinishLogits, ScaleEmbeddings
from distill_nemo.models.layers.residual import NormedAdd, replace_add, scaled_add
from distill_nemo.models.layers.rotary import give_rotary_embeddings
from distill_nemo.models.layers.specs import block_spec, drop_pre_norms, uses_transformer_engine
from distill_nemo.models.layers.wide_norms import give_wide_norms
from distill_nemo.models.layouts import check_layout, check_transformer_engine

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
    "clamped_quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Megatron clamps its input
}

Recompute = Literal["full", "selective"]


def transformer_config(
    model: Architecture, parallelism: ParallelismConfig, dtype: torch.dtype, recompute: Recompute | None = None
) -> TransformerConfig:
    """Return Megatron's config of an architecture at a parallel layout.

    Args:
        model: the architecture.
        parallelism: Megatron's parallel sizes. Layers need not divide evenly over the stages.
        dtype: dtype of weights and activations.
        recompute: `full` (every layer), `selective` (the core attention) or None.

    Raises:
        ValueError: if the layout does not divide heads, experts or vocabulary. The message has both numbers.
    """
    check_layout(model, parallelism)
    if uses_transformer_engine(model, dtype):
        check_transformer_engine(model, parallelism)
    on_cpu = not torch.cuda.is_available()
    if any(layer.mixer == "mamba" for layer in model.layers) and not on_cpu:
        fused_kernel()  # which must be installed
    kind, differing = TransformerConfig, {}
    no_rope = [int(layer.rope is None) for layer in model.layers]
    if model.block_configs is not None:
        kind, blocks = HeterogeneousTransformerConfig, {"block_configs": write_block_configs(model.layers)}
        differing["heterogeneous_layers_config_encoded_json"] = json.dumps(blocks)
    fields = dict(
        **_window_settings(model),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=model.gated,
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        attention_output_gate=model.output_gate,
        qk_layernorm=model.qk_norm and not model.wide_qk_norm,
        softmax_type="learnable" if model.attention_sinks else "vanilla",
        no_rope_freq=no_rope if any(no_rope) else None,
        init_method_std=model.init_std,
        **_initialisation(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,  # set before DDP is built, which scales gradients accordingly
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallelism.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_stage_layout(model.num_layers, parallelism),
        context_parallel_size=parallelism.context_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        use_cpu_initialization=True,  # the same weights at every tensor parallel size
        bias_activation_fusion=not on_cpu and model.activation in FUSED_ACTIVATIONS,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deterministic_mode=False,
        hetereogenous_dist_checkpoint=_layers_differ(model),
    )
    experts = expert_settings(model, parallelism, dtype)
    delta_nets = _delta_net_settings(model, dtype)
    return kind(**{**fields, **differing, **experts, **delta_nets, **FAMILIES[model.family].settings(model)})


def _delta_net_settings(model: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    if model.delta_net is None:
        return {}
    try:
        from distill_nemo.models.layers.gated_delta_net import delta_net_settings
    except ImportError as error:
        raise ValueError(f"{model.name}: its gated delta nets need megatron-core 0.19: {error}") from None
    return delta_net_settings(model, model.delta_net, dtype)


def _layers_differ(model: Architecture) -> bool:
    """Return True if layers have different parts, so that a checkpoint cannot hold them stacked."""
    kinds = {
        (layer.mixer, layer.num_query_groups is None, layer.ffn_hidden_size is None, layer.has_experts)
        for layer in model.layers
    }
    return len(kinds) > 1


def _initialisation(model: Architecture) -> dict[str, Any]:
    """Skip random initialisation if a checkpoint fills the weights: every rank would draw every whole tensor.

    ModelOpt computes with the weights while it restores its changes to a model, so then they are zeros.
    """
    if model.source is None:
        return {}
    if model.source.modified_by_modelopt:
        return {"init_method": zeros_, "output_layer_init_method": zeros_}
    return {"perform_initialization": False}


def _window_settings(model: Architecture) -> dict[str, Any]:
    """Return Megatron's fields for layers with a sliding window.

    Raises:
        ValueError: if windows differ in size.
    """
    windows = {layer.window for layer in model.layers if layer.window is not None}
    if not windows:
        return {}
    if len(windows) > 1:
        raise ValueError(
            f"{model.name}: windows of {sorted(windows)} tokens in one model are not supported; all must have one size"
        )
    windowed = [int(layer.window is not None) for layer in model.layers]
    return {"window_size": (windows.pop() - 1, 0), "window_attn_skip_freq": windowed}


def _stage_layout(num_layers: int, parallelism: ParallelismConfig) -> list[list[str]] | None:
    """Return the contents of each pipeline stage, in the order of the model and in Megatron's notation."""
    if parallelism.num_stages == 1:
        return None
    if num_layers < parallelism.num_stages:
        raise ValueError(f"num_layers = {num_layers} cannot fill {parallelism.num_stages} pipeline stages")
    stages = [["decoder"] * size for size in parallelism.stage_sizes(num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def gpt_model(
    model: Architecture,
    config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    parallel_output: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this pipeline stage with random weights. Only here is `GPTModel` built, which Megatron deprecates."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    block, multipliers = block_spec(model, config, vp_stage), model.multipliers
    if not model.pre_norms:
        drop_pre_norms(block, uses_transformer_engine(model, config.params_dtype))
    if model.post_norms:
        replace_add(block, ModuleSpec(NormedAdd, params={"config": config, "norm": block.layer_norm}))
    elif multipliers.residual != 1:
        replace_add(block, scaled_add(multipliers.residual))
    built = GPTModel(
        config,
        block,  # pyright: ignore[reportArgumentType]  # it takes the layers of a block, too
        vocab_size=padded_vocab_size(model.vocab_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope" if model.ropes else "none",
        vp_stage=vp_stage,
    )
    clone_expert_outputs(built)
    if model.wide_qk_norm:
        give_wide_norms(built)
    if model.ropes:
        give_rotary_embeddings(built, model)
    if pre_process and multipliers.embedding != 1:
        built.embedding.register_forward_hook(ScaleEmbeddings(multipliers, config.params_dtype))
    if post_process:
        built.output_layer.register_forward_hook(FinishLogits(multipliers, model.vocab_size))
    return built

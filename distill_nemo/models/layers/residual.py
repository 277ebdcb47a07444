"""Add the outputs of attention and MLP to the residual stream, multiplied by a constant or normalised.

Megatron has a place for this in every layer (`self_attn_bda`, `mlp_bda`), the same with and without Transformer Engine.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]  # (x, its bias), residual stream, dropout


def scaled_add(factor: float) -> Callable[[bool, bool], Add]:
    """Add `factor * x`. Our layers have no bias or dropout there."""

    def build(training: bool, fused: bool) -> Add:
        return lambda x_and_bias, residual, dropout: torch.add(residual, x_and_bias[0], alpha=factor)

    return build


class NormedAdd(nn.Module):
    """Add `norm(x)`: a norm after attention or MLP. Our layers have no bias or dropout there."""

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Add:
        """Return the function that adds, as Megatron's own does."""
        return lambda x_and_bias, residual, dropout: residual + self.norm(x_and_bias[0])


def replace_add(block: TransformerBlockSubmodules, add: Callable[[bool, bool], Add] | ModuleSpec) -> None:
    """Replace the residual additions of all layers, after attention and after MLP."""
    replacement: Any = add
    for layer in block.layer_specs or []:
        parts = layer.submodules
        assert isinstance(parts, TransformerLayerSubmodules)
        if parts.self_attn_bda is get_bias_dropout_add:  # else the layer has no attention
            parts.self_attn_bda = replacement
        if parts.mlp_bda is get_bias_dropout_add:
            parts.mlp_bda = replacement

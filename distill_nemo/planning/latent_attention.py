"""Bytes and operations of latent attention.

With Transformer Engine, queries, keys, values and outputs have their own widths; our attention pads them to one.
"""

from distill_nemo.models.architecture import Architecture, Latent
from distill_nemo.planning.planned import PlannedRun


def _own(planned: PlannedRun, model: Architecture) -> tuple[Latent, int, int]:
    """Return the sizes, the bytes of a number of every head of this rank, and the channels of the widest vector."""
    assert model.latent is not None
    heads = model.num_attention_heads // planned.config.parallelism.tensor_model_parallel_size
    return model.latent, planned.item * planned.tokens * heads, max(model.latent.qk_head_dim, model.kv_channels)


def saved_by_latent_attention(planned: PlannedRun, model: Architecture, recompute: str | None) -> int:
    """Return the bytes that a layer saves for backward in one micro batch, without its norms."""
    sizes, each, width = _own(planned, model)
    shared = planned.item * planned.split_tokens * sizes.qk_rope_head_dim
    if recompute == "selective":
        return shared + each * 2 * (sizes.qk_head_dim + model.kv_channels)
    cut = 0 if planned.transformer_engine or model.kv_channels == width else model.kv_channels  # of padded outputs
    softmax_statistics = 4 * each // planned.item
    return shared + softmax_statistics + _core(planned, model) + each * cut


def _core(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes of queries, keys, values and outputs."""
    sizes, each, width = _own(planned, model)
    return each * (2 * (sizes.qk_head_dim + model.kv_channels) if planned.transformer_engine else 4 * width)


def forward_workspace_of_latent_attention(planned: PlannedRun, model: Architecture) -> int:
    """Return the peak bytes of a layer's forward pass if nothing is saved, once it has queries, keys and values."""
    sizes, each, width = _own(planned, model)
    values = model.kv_channels
    return each * (2 * sizes.qk_head_dim + values + (values if planned.transformer_engine else 4 * width))


def backward_workspace_of_latent_attention(planned: PlannedRun, model: Architecture) -> int:
    """Return the peak bytes of a layer's backward pass beyond its saved tensors: gradients, and what it recomputes."""
    if planned.config.training.recompute != "selective":
        return _core(planned, model)
    sizes, each, width = _own(planned, model)
    copies = 3 if sizes.qk_head_dim == width else 4  # queries only if they are padded
    return _core(planned, model) + each * (model.kv_channels if planned.transformer_engine else copies * width)


def latent_attention_flops(model: Architecture, keys: float) -> tuple[float, float]:
    """Return forward operations per token of the projections, and of the core attention over `keys` keys."""
    sizes, width = model.latent, model.hidden_size
    assert sizes is not None
    queries, values = (model.num_attention_heads * channels for channels in (sizes.qk_head_dim, model.kv_channels))
    up = model.num_attention_heads * sizes.qk_nope_head_dim + values
    weights = width * queries if sizes.q_lora_rank is None else (width + queries) * sizes.q_lora_rank
    weights += width * (sizes.kv_lora_rank + sizes.qk_rope_head_dim) + sizes.kv_lora_rank * up + values * width
    return 2 * weights, 2 * keys * (queries + values)

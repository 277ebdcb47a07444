"""Bytes that a layer saves for its backward pass or needs temporarily, tensor by tensor.

With Transformer Engine: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198), section 4, for gated MLPs, grouped queries and attention that keeps no scores. Without it: the
tensors that Megatron's local layers and our RMSNorm save, as observed on CPU (docs/planning.md).

Legend: T tokens of a micro batch on a rank, H width, F width of an MLP, N = heads * channels, K = query groups *
channels (N, K, F on one tensor-parallel rank).
"""

from distill_nemo.models.architecture import FUSED_ACTIVATIONS, QUERY_BLOCK, Architecture, Layer
from distill_nemo.planning.delta_nets import delta_net_workspace, saved_by_delta_net
from distill_nemo.planning.latent_attention import (
    backward_workspace_of_latent_attention,
    forward_workspace_of_latent_attention,
    saved_by_latent_attention,
)
from distill_nemo.planning.mamba import backward_workspace_of_mamba, forward_workspace_of_mamba, saved_by_mamba
from distill_nemo.planning.parameters import layer_parameters
from distill_nemo.planning.planned import PlannedRun


def saved(planned: PlannedRun, model: Architecture, layer: Layer, recompute: str | None) -> int:
    """Return the bytes that a layer saves for backward in one micro batch; with full recomputation, its input only."""
    if recompute == "full":
        return planned.item * planned.split_tokens * model.hidden_size
    bytes_ = _saved_by_mixer(planned, model, layer, recompute) + saved_by_mlp(planned, model, layer)
    if model.quantization is not None and model.quantization.format != "none":  # rounded weights, of every micro batch
        bytes_ += planned.item * layer_parameters(model, layer, planned.config.parallelism).total
    return bytes_


def _saved_by_mixer(planned: PlannedRun, model: Architecture, layer: Layer, recompute: str | None) -> int:
    if layer.mixer == "mamba":
        return _norms(planned, model) + saved_by_mamba(planned, model)
    if layer.mixer == "latent_attention":
        assert model.latent is not None
        latents = _norm(planned, model.latent.kv_lora_rank) + _norm(planned, model.latent.q_lora_rank or 0)
        return _norms(planned, model) + latents + saved_by_latent_attention(planned, model, recompute)
    if layer.mixer == "gated_delta_net":
        return _norms(planned, model) + saved_by_delta_net(planned, model)
    return 0 if layer.num_query_groups is None else _saved_by_attention(planned, model, layer, recompute)


def _saved_by_attention(planned: PlannedRun, model: Architecture, layer: Layer, recompute: str | None) -> int:
    tensor, item, tokens = planned.config.parallelism.tensor_model_parallel_size, planned.item, planned.tokens
    n = model.num_attention_heads * model.kv_channels // tensor
    k = _key_channels(model, layer, tensor)
    qk_norm = model.qk_norm
    bytes_ = _norms(planned, model)
    softmax_statistics = 4 * tokens * model.num_attention_heads // tensor
    gate = n if model.output_gate else 0
    if planned.transformer_engine and not model.needs_own_attention:
        return bytes_ + softmax_statistics + item * tokens * (2 * n + 2 * k + (n + k if qk_norm else 0) + 2 * gate)
    if recompute != "selective":
        bytes_ += softmax_statistics
    grouped, capped = k < n, model.multipliers.attention_softcap is not None
    as_given = recompute == "selective" or capped  # queries, keys and values, not copies of them
    whole = not grouped or as_given or (qk_norm and item == 4)  # a view of joint q, k, v is saved
    numbers = 2 * n + (n + 2 * k + gate if whole else 0)  # queries, the output
    numbers += 2 * gate  # its sigmoid, and the product
    if as_given:
        numbers += k
    elif model.attention_sinks:
        numbers = _saved_with_sinks(model, layer, n)
    else:
        numbers += 2 * n if grouped else n  # keys and values, repeated for the heads that share them
    if layer.window is not None and not capped:
        numbers += n  # outputs of blocks of queries, before they are one
    if qk_norm and item == 4:
        numbers += n + k + (n if grouped else 0)
    elif qk_norm:
        bytes_ += (4 + item) * tokens * (n + k)
    return bytes_ + item * tokens * numbers


def _saved_with_sinks(model: Architecture, layer: Layer, n: int) -> int:
    """Return the numbers of a token: padded queries, keys, values and output, and the output without its padding."""
    again = 0.0 if layer.window is None else layer.window / QUERY_BLOCK  # keys that several blocks of queries see
    padded = round((2 + 2 * (1 + again)) * n * (1 + 1 / model.kv_channels))
    return padded + (n if layer.window is None else 0)


def _score_blocks(planned: PlannedRun, model: Architecture, tensors: int) -> int:
    """Return the bytes of capped scores: fp32 tensors of the scores of a block of queries."""
    if model.multipliers.attention_softcap is None:
        return 0
    par, length = planned.config.parallelism, planned.config.data.sequence_length
    queries = min(QUERY_BLOCK, length // par.context_parallel_size)
    heads = model.num_attention_heads // par.tensor_model_parallel_size
    narrow = 2 if planned.item == 2 else 0
    return (4 * tensors + narrow) * planned.config.training.micro_batch_size * heads * queries * length


def _key_channels(model: Architecture, layer: Layer, tensor: int) -> int:
    """Return the channels of a rank's keys: at least one group, which ranks share where there are fewer groups."""
    return max((layer.num_query_groups or 0) // tensor, 1) * model.kv_channels


def saved_by_mlp(planned: PlannedRun, model: Architecture, layer: Layer) -> int:
    """Return the bytes that the MLP or the experts save, norm included. Tokens are assumed to be spread evenly."""
    if layer.ffn_hidden_size is None:
        return 0
    bytes_ = _norms(planned, model)
    pieces = _mlp_pieces(planned, model)
    tensor = planned.config.parallelism.tensor_model_parallel_size
    f = layer.ffn_hidden_size // tensor
    if not layer.has_experts or model.experts is None:
        return bytes_ + planned.item * planned.tokens * pieces * f
    rows = planned.tokens * model.experts.num_experts_per_tok
    bytes_ += planned.item * planned.tokens * pieces * (model.experts.shared_ffn_hidden_size or 0) // tensor
    if model.experts.has_shared_gate:
        bytes_ += planned.item * planned.split_tokens * (model.hidden_size + 1)  # output, and its factor
    pieces += 0 if planned.on_gpu else 1
    router = 8 * planned.tokens * model.experts.num_experts
    return bytes_ + planned.item * rows * (pieces * f + 2 * model.hidden_size) + router


def _mlp_pieces(planned: PlannedRun, model: Architecture) -> int:
    """Return the tensors of the MLP's width that it saves: both halves and their product; two more if not fused.

    Without a gate they are the activation and its square. A clamped activation also saves its input and its sigmoid.
    """
    if not model.gated:
        return 2
    if planned.on_gpu and model.activation in FUSED_ACTIVATIONS:
        return 3
    return 7 if model.activation == "clamped_quick_gelu" else 5


def _norms(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes of the norms around attention or MLP, or of the residual stream where none is before them."""
    numbers = planned.split_tokens * model.hidden_size
    before = _norm(planned, model.hidden_size) if model.pre_norms else planned.item * numbers
    each = planned.item if planned.transformer_engine else 8 if planned.item == 4 else 6
    return before + (each * numbers if model.post_norms else 0)  # input; ours also keeps the normalised input


def _norm(planned: PlannedRun, width: int) -> int:
    """Return the bytes of a norm's input (the residual stream) and output; ours also saves the normalised input."""
    each = 2 * planned.item
    if not planned.transformer_engine:
        each = 12 if planned.item == 4 else 8
    return planned.split_tokens * width * each


def final_norm(planned: PlannedRun, model: Architecture) -> int:
    """Return the bytes that the norm after the last layer saves."""
    return _norm(planned, model.hidden_size)


def backward_workspace(planned: PlannedRun, model: Architecture, layer: Layer) -> int:
    """Return the peak bytes of a layer's backward pass beyond its saved tensors.

    They are the gradients of both halves of the MLP, whose product's gradient takes the product's place; or those of
    queries, keys, values and outputs in latent attention, and with capped scores. Shared experts come after the others.
    """
    tensor = planned.config.parallelism.tensor_model_parallel_size
    shared = model.experts.shared_ffn_hidden_size or 0 if layer.has_experts and model.experts else 0
    f = max(model.ffn_per_token(layer) - shared, shared) // tensor
    residual = 2 * planned.item * planned.split_tokens * model.hidden_size
    mixer = backward_workspace_of_mamba(planned, model) if layer.mixer == "mamba" else 0
    after_mlp = _attention_backward(planned, model, layer)
    if after_mlp:
        after_mlp -= saved_by_mlp(planned, model, layer)  # which is freed by then
    return max(2 * planned.item * planned.tokens * f, after_mlp, mixer) + residual


def _attention_backward(planned: PlannedRun, model: Architecture, layer: Layer) -> int:
    """Return the bytes of attention's backward pass, where they may be more than the MLP's; else 0."""
    if layer.mixer == "latent_attention":
        return backward_workspace_of_latent_attention(planned, model)
    blocks, tensor = _score_blocks(planned, model, 3), planned.config.parallelism.tensor_model_parallel_size
    if not blocks:
        return 0
    n = model.num_attention_heads * model.kv_channels // tensor
    return blocks + planned.tokens * (2 * planned.item * n + 8 * _key_channels(model, layer, tensor))


def forward_workspace(planned: PlannedRun, model: Architecture, layer: Layer) -> int:
    """Return the bytes of a layer's forward pass without saved tensors, its input included."""
    tensor, item, tokens = planned.config.parallelism.tensor_model_parallel_size, planned.item, planned.tokens
    residual = 2 * item * planned.split_tokens * model.hidden_size
    pieces = _mlp_pieces(planned, model) + (not model.gated)
    mlp = item * tokens * pieces * model.ffn_per_token(layer) // tensor
    if layer.has_experts and model.experts is not None:
        mlp += 2 * item * tokens * model.experts.num_experts_per_tok * model.hidden_size
    if layer.mixer == "mamba":
        return residual + max(mlp, forward_workspace_of_mamba(planned, model))
    if layer.mixer == "latent_attention":
        return residual + max(mlp, forward_workspace_of_latent_attention(planned, model))
    if layer.mixer == "gated_delta_net":
        return residual + max(mlp, delta_net_workspace(planned, model))
    if layer.num_query_groups is None:
        return residual + mlp
    n = model.num_attention_heads * model.kv_channels // tensor
    k = _key_channels(model, layer, tensor)
    numbers = (n + 2 * k) + (n + k) + n  # joint q, k, v; rotated q and k; the output
    blocks = _score_blocks(planned, model, 2)
    if blocks or (planned.transformer_engine and not model.needs_own_attention):
        return residual + max(mlp, blocks + item * tokens * numbers)
    numbers += n + (2 * n if k < n else 0)
    return residual + max(mlp, item * tokens * numbers)

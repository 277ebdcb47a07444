"""Parallel layouts at which a model is computed exactly. No torch: the launcher chooses layouts by these checks."""

from collections.abc import Iterator

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture, padded_vocab_size
from distill_nemo.quantization import CACHE_FORMATS, QuantizationConfig, format_of, is_excluded


def check_layout(model: Architecture, parallelism: ParallelismConfig) -> None:
    """Refuse parallel sizes that do not divide a model, or at which it is not computed exactly.

    Raises:
        ValueError: naming the model, what it has, and the field.
    """
    tensor, expert = parallelism.tensor_model_parallel_size, parallelism.expert_model_parallel_size
    if model.experts is not None and model.experts.num_experts % expert:
        raise ValueError(
            f"{model.name}: num_experts = {model.experts.num_experts} is not divisible by "
            f"parallelism.expert_model_parallel_size = {expert}"
        )
    if model.experts is not None and model.linear_bias and tensor > 1:
        raise ValueError(
            f"{model.name}: experts with biases cannot be split: set parallelism.tensor_model_parallel_size = {tensor} "
            "to 1, and parallelism.expert_model_parallel_size higher instead"
        )
    sizes = {
        f"{'moe_' if layer.has_experts else ''}ffn_hidden_size of layer {i}": layer.ffn_hidden_size
        for i, layer in enumerate(model.layers)
    }
    sizes |= {
        "width of the shared experts": model.experts.shared_ffn_hidden_size if model.experts else None,
        "num_attention_heads": model.num_attention_heads,
        "padded vocabulary": padded_vocab_size(model.vocab_size),
    }
    for name, value in sizes.items():
        if value is not None and value % tensor:
            raise ValueError(
                f"{model.name}: {name} = {value} is not divisible by parallelism.tensor_model_parallel_size = {tensor}"
            )
    _check_modelopt(model, parallelism)
    _check_mamba(model, parallelism)
    _check_delta_nets(model, parallelism)
    if model.quantization is not None:
        _check_quantization(model, model.quantization, tensor)
    for i, layer in enumerate(model.layers):
        groups = layer.num_query_groups
        if groups is not None and groups % tensor and model.wide_qk_norm:
            raise ValueError(
                f"{model.name}: num_query_groups of layer {i} = {groups} is not divisible by "
                f"parallelism.tensor_model_parallel_size = {tensor}, as norms over all heads need"
            )
        if groups is not None and groups % tensor and (tensor % groups or model.block_configs is not None):
            raise ValueError(
                f"{model.name}: num_query_groups of layer {i} = {groups} is neither a multiple nor a divisor of "
                f"parallelism.tensor_model_parallel_size = {tensor}"
            )


def _check_modelopt(model: Architecture, parallelism: ParallelismConfig) -> None:
    """Refuse layouts at which ModelOpt's changes to a model cannot be restored."""
    if model.source is None or not model.source.modified_by_modelopt:
        return
    if parallelism.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            f"{model.source.weights} was modified by ModelOpt, which supports no virtual pipeline: leave "
            "parallelism.virtual_pipeline_model_parallel_size unset"
        )
    if parallelism.tensor_model_parallel_size > 1:
        # ModelOpt 0.47 splits linear_fc1's scales by consecutive rows, but its weight into gate and up first.
        raise ValueError(
            f"{model.source.weights} was modified by ModelOpt: its quantizers' scales cannot be split over tensor "
            "parallel ranks; set parallelism.tensor_model_parallel_size=1"
        )


def _check_mamba(model: Architecture, parallelism: ParallelismConfig) -> None:
    """Refuse layouts that Mamba layers do not have."""
    if model.mamba is None or all(layer.mixer != "mamba" for layer in model.layers):
        return
    tensor, context = parallelism.tensor_model_parallel_size, parallelism.context_parallel_size
    if context > 1:
        raise ValueError(
            f"{model.name}: Mamba layers are not supported under parallelism.context_parallel_size = {context}: a "
            "token's state follows from all tokens before it. Set that to 1, and "
            "parallelism.tensor_model_parallel_size higher instead"
        )
    if model.mamba.num_groups % tensor:
        raise ValueError(
            f"{model.name}: {model.mamba.num_groups} groups of Mamba's heads are not divisible by "
            f"parallelism.tensor_model_parallel_size = {tensor}"
        )


def _check_delta_nets(model: Architecture, parallelism: ParallelismConfig) -> None:
    ranks = parallelism.tensor_model_parallel_size * parallelism.context_parallel_size
    if model.delta_net is not None and model.delta_net.linear_num_key_heads % ranks:  # they divide the value heads
        raise ValueError(
            f"{model.name}: linear_num_key_heads = {model.delta_net.linear_num_key_heads} is not divisible by "
            f"parallelism.tensor_model_parallel_size x context_parallel_size = {ranks}"
        )


def _check_quantization(model: Architecture, config: QuantizationConfig, tensor: int) -> None:
    """Refuse rows that blocks of the format do not divide, and parts that are not quantised."""
    linear, cache = format_of(config), CACHE_FORMATS.get(config.kv_cache)
    block = linear.weights.block if linear else None
    for name, length, is_split in linear_layers(model):
        own = length // tensor if is_split else length
        if block and own % block and not is_excluded(config, name):
            where = f" on each of parallelism.tensor_model_parallel_size = {tensor} ranks" if is_split else ""
            smaller = ", set quantization.block_size" if config.format == "int4_weights" else ""
            raise ValueError(
                f'{model.name}: quantization.format = "{config.format}" has blocks of {block} weights, which do not '
                f"divide the {own} of a row of {name}{where}: choose another tensor parallel size{smaller}, or add the "
                "layer to quantization.exclude"
            )
    if cache is not None and model.latent is not None:
        raise ValueError(
            f'{model.name}: quantization.kv_cache = "{config.kv_cache}" is not supported with latent attention, which '
            'caches the latents; set it to "none"'
        )
    if cache is not None and cache.block and model.kv_channels % cache.block:
        raise ValueError(
            f'{model.name}: quantization.kv_cache = "{config.kv_cache}" needs heads of a multiple of {cache.block} '
            f'channels, it has {model.kv_channels}; set it to "none" or "fp8"'
        )
    if linear and model.tie_word_embeddings and not is_excluded(config, "output_layer"):
        raise ValueError(
            f'{model.name}: its output layer is its embedding, which is not quantised: add "output_layer" to '
            "quantization.exclude"
        )


def linear_layers(model: Architecture) -> Iterator[tuple[str, int, bool]]:
    """Yield the linear layers that are quantised: name, length of a row, and True if TP splits rows."""
    for i, layer in enumerate(model.layers):
        attention, mlp = f"decoder.layers.{i}.self_attention", f"decoder.layers.{i}.mlp"
        heads = model.num_attention_heads * model.kv_channels
        if layer.mixer == "mamba" and model.mamba:
            yield f"{attention}.in_proj", model.hidden_size, False
            yield f"{attention}.out_proj", model.mamba.channels, True
        elif layer.mixer == "gated_delta_net" and model.delta_net:
            yield f"{attention}.in_proj", model.hidden_size, False
            yield f"{attention}.out_proj", model.delta_net.value_channels, True
        elif layer.mixer == "latent_attention" and model.latent:
            up = ("linear_q_up_proj", model.latent.q_lora_rank)
            name, length = up if up[1] else ("linear_q_proj", model.hidden_size)
            yield f"{attention}.{name}", length or 0, False
            yield f"{attention}.linear_kv_up_proj", model.latent.kv_lora_rank, False
            yield f"{attention}.linear_proj", heads, True
        elif layer.num_query_groups is not None:
            yield f"{attention}.linear_qkv", model.hidden_size, False
            yield f"{attention}.linear_proj", heads, True
        if layer.ffn_hidden_size is not None:
            experts = f"{mlp}.experts" if layer.has_experts else mlp
            yield f"{experts}.linear_fc1", model.hidden_size, False
            yield f"{experts}.linear_fc2", layer.ffn_hidden_size, True
        if layer.has_experts and model.experts and model.experts.shared_ffn_hidden_size:
            yield f"{mlp}.shared_experts.linear_fc1", model.hidden_size, False
            yield f"{mlp}.shared_experts.linear_fc2", model.experts.shared_ffn_hidden_size, True
    yield "output_layer", model.hidden_size, False


def check_transformer_engine(model: Architecture, parallelism: ParallelismConfig) -> None:
    """Refuse attention that Transformer Engine does not compute under context parallelism.

    Raises:
        ValueError: naming the model, what it has, and the field.
    """
    context = parallelism.context_parallel_size
    windows = [layer.window for layer in model.layers if layer.window is not None]
    if context == 1 or model.needs_own_attention:
        windows = []
    if windows:
        raise ValueError(
            f"{model.name}: its sliding windows of {windows[0]} tokens are not supported with Transformer Engine under "
            f"parallelism.context_parallel_size = {context}. Set that to 1, and "
            f"parallelism.tensor_model_parallel_size higher instead; or data.sequence_length to at most {windows[0]}"
        )
    if model.latent is not None and context > 1:
        raise ValueError(
            f"{model.name}: latent attention is not supported with Transformer Engine under "
            f"parallelism.context_parallel_size = {context}. Set that to 1, and "
            "parallelism.tensor_model_parallel_size higher instead"
        )

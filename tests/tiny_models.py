"""Tiny random Hugging Face models of every supported family, made by transformers.

They are also written as Megatron and NeMo checkpoints, by a conversion that shares no code with the package's.
"""

import argparse
import copy
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from packaging.version import Version
from safetensors.torch import load_file, save_file

LLAMA3_ROPE = {  # in the spelling of transformers 4, which 5 reads too
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = [1.0 + i / 8 for i in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
FAMILIES = (
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "llama",
    "llama_tied",
    "llama3_rope",
    "yarn_rope",
    "longrope",
    "ministral",
    "mistral",
    "mixtral",
    "nemotron_h",
    "nemotron_h_moe",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_dense_layers",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "seed_oss",
    "smollm3",
)
MODEL_TYPES = {  # families whose type in transformers differs
    "llama_tied": "llama",
    "llama3_rope": "llama",
    "yarn_rope": "llama",
    "longrope": "llama",
    "kimi_k2": "deepseek_v3",
    "nemotron_h_moe": "nemotron_h",
    "qwen2_window": "qwen2",
    "qwen3_moe_dense_layers": "qwen3_moe",
    "qwen3_moe_not_normalised": "qwen3_moe",
    "qwen3_moe_window": "qwen3_moe",
}
WITH_DELTA_NETS = ("qwen3_next", "qwen3_5")


def known(family):
    """Return True if the installed versions of transformers and Megatron-Core have the family."""
    if family.startswith(WITH_DELTA_NETS) and Version(version("megatron-core")) < Version("0.19"):
        return False
    models = Path(find_spec("transformers").origin).parent / "models"
    return (models / MODEL_TYPES.get(family, family).removesuffix("_text")).is_dir()


FAMILIES = tuple(filter(known, FAMILIES))
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # in place of ids beyond the rows
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GEMMA = {"head_dim": 24, "sliding_window": 5, "query_pre_attn_scalar": 20, "tie_word_embeddings": True, **NO_TOKENS}
NEMOTRON = {
    "head_dim": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 4,
    "ssm_state_size": 16,
    "chunk_size": 128,  # beyond it, and where steps are below their minimum, transformers is wrong without CUDA
    "time_step_min": 1e-9,
    "time_step_floor": 0.2,  # else random weights have steps so small that no output depends on the states
    "use_mamba_kernels": False,
    **NO_TOKENS,
}
DELTA_NET = {
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    **NO_TOKENS,
}
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.05,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
    "tie_word_embeddings": True,
}
OWN_FIELDS = {  # of config.json
    "deepseek_v3": {
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "rope_theta": 1e4,
        "rope_scaling": YARN_ROPE | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
        **NO_TOKENS,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 24,
        "sliding_window": 5,
        "rope_theta": 1e4,
        "rope_scaling": {**YARN_ROPE, "truncate": False},
        **NO_TOKENS,
    },
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 8.0, **GEMMA},
    "gemma3_text": {
        "rope_local_base_freq": 1e3,
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 8.0,
        **GEMMA,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "head_dim": 24,
        **NO_TOKENS,
    },
    "glm4_moe_lite": {
        "q_lora_rank": None,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_shared_experts": 2,
        "mlp_layer_types": ["sparse", "dense"] * 2,
        "rope_theta": 1e4,
        **NO_TOKENS,
    },
    "granite": MULTIPLIERS,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **MULTIPLIERS},
    "granitemoehybrid": {
        "layer_types": ["attention"] * 4,
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "position_embedding_type": "rope",
        "mamba_n_heads": 1,
        **MULTIPLIERS,
    },
    "llama_tied": {"tie_word_embeddings": True},
    "llama3_rope": LLAMA3_ROPE,
    "yarn_rope": {"rope_theta": 1e4, "rope_scaling": YARN_ROPE},
    "longrope": {"rope_theta": 1e4, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    "phi3": {
        "rope_scaling": {"type": "longrope", "short_factor": FACTORS[:6], "long_factor": [6.0] * 6},
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        **NO_TOKENS,
    },
    "olmo2": NO_TOKENS,
    "olmo3": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_theta": 5e5,
        "rope_scaling": YARN_ROPE,
        **NO_TOKENS,
    },
    "qwen3_5_text": {**DELTA_NET},
    "qwen3_5_moe_text": {**EXPERTS, "shared_expert_intermediate_size": 40, **DELTA_NET},
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], **DELTA_NET},
    "seed_oss": {"head_dim": 24, **NO_TOKENS},
    "smollm3": {"no_rope_layer_interval": 2, **NO_TOKENS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "head_dim": 24, **NO_TOKENS},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, **NO_TOKENS},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    "mistral": {"sliding_window": 5, "head_dim": 24},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "attention", "mamba"], **NEMOTRON},
    "nemotron_h_moe": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 2.5,
        **NEMOTRON,
    },
    "ministral": {"head_dim": 24, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True, "head_dim": 24},
    "qwen3_moe_dense_layers": {**EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 24},
    "qwen3_moe_not_normalised": {**EXPERTS, "norm_topk_prob": False, "head_dim": 24},
    "qwen3_moe_window": {**EXPERTS, "use_sliding_window": True, "sliding_window": 5, "head_dim": 24},
}

REFUSED: dict[str, tuple[str, ...]] = {  # by family, parts of layouts, such as CP=2, that it refuses at the start
    "gpt_oss": ("TP=2", "TP=4"),
    "nemotron_h": ("CP=2",),
    "nemotron_h_moe": ("CP=2",),
}


def has_experts(family):
    """Return True if models of the family are mixtures of experts."""
    return "num_experts_per_tok" in OWN_FIELDS.get(family, {})


def refuses(family, layout):
    """Return True if the family refuses a part of a layout, such as "TP=2, CP=2"."""
    return any(part in layout.split(", ") for part in REFUSED.get(family, ()))


def write_hf(path, family="llama", *, seed=1, layers=4, width=64, vocab=507, heads=4, groups=2, offset=0.0):
    """Save a random fp32 model with grouped-query attention and a vocabulary that needs padding. Return its path.

    With an offset, all logits of a token are higher by about that much, as in trained models.
    """
    from transformers import AutoConfig

    own = copy.deepcopy(OWN_FIELDS.get(family, {}))  # transformers writes into the dictionaries
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in own:
            own[name] = (own[name] * layers)[:layers]
    config = AutoConfig.for_model(
        MODEL_TYPES.get(family, family),
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if "kv_lora_rank" in own else groups,
        vocab_size=vocab,
        max_position_embeddings=128,
        initializer_range=0.1,
        **own,
    )
    model = random_model(config, seed)
    if offset:
        _add_offset(model, offset)
    model.save_pretrained(str(path))
    if MODEL_TYPES.get(family, family) == "nemotron_h":
        _rename(Path(path, "model.safetensors"), "backbone.embedding.weight", "backbone.embeddings.weight")
    return str(path)


def random_model(config, seed=1):
    """Return transformers' fp32 model with random weights: biases and norms too, so that a forgotten one shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def _rename(file, name, hub):
    """Give a tensor its name in the files on the hub, where transformers writes another."""
    tensors = load_file(file)
    save_file({hub if key == name else key: tensor for key, tensor in tensors.items()}, file, {"format": "pt"})


@torch.no_grad()
def _add_offset(model, offset):
    """Give all tokens a common hidden component, which the output layer multiplies by one number for all logits.

    It is the last component: a product adds it to sums that are small until then, and rounds once.
    """
    seen = []
    model.lm_head.weight.mul_(8)  # logits of about 4 around the offset
    model.model.embed_tokens.weight[:, -1] = 1.0
    hook = model.model.norm.register_forward_hook(lambda _, __, hidden: seen.append(hidden[..., -1].mean()))
    model(torch.arange(model.config.vocab_size).view(3, -1)[:, :16])
    hook.remove()
    model.lm_head.weight[:, -1] = offset / seen[0]


LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",  # before experts it is the reverse
}


def megatron_layers(path):
    """Return a Hugging Face directory's layers in Megatron's form, by Transformer Engine's names: one dict per layer.

    `linear_qkv` holds, group by group, the group's queries, its key and its value; `linear_fc1` the gate, then the up
    projection.
    """
    config, hf = json.loads(Path(path, "config.json").read_text()), load_file(Path(path, "model.safetensors"))
    groups, layers = config["num_key_value_heads"], []
    for i in range(config["num_hidden_layers"]):
        one = {k.removeprefix(f"model.layers.{i}."): t for k, t in hf.items() if k.startswith(f"model.layers.{i}.")}
        layer = {
            "self_attention.linear_qkv.layer_norm_weight": one["input_layernorm.weight"],
            "self_attention.linear_proj.weight": one["self_attn.o_proj.weight"],
        }
        norm = one["post_attention_layernorm.weight"]
        if "num_experts_per_tok" in config:
            layer |= {"pre_mlp_layernorm.weight": norm, "mlp.router.weight": one["mlp.gate.weight"]}
            experts = [_mlp(one, f"mlp.experts.{e}.") for e in range(len(one["mlp.gate.weight"]))]
            layer |= {f"mlp.experts.experts.{n}": torch.stack([e[n] for e in experts]) for n in experts[0]}
        else:
            layer |= {"mlp.linear_fc1.layer_norm_weight": norm}
            layer |= {f"mlp.{n}": weight for n, weight in _mlp(one, "mlp.").items()}
        for kind in ("weight", "bias"):
            parts = [one.get(f"self_attn.{n}_proj.{kind}") for n in "qkv"]
            if parts[0] is not None:
                by_group = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1)
                layer[f"self_attention.linear_qkv.{kind}"] = by_group.flatten(0, 1)
        for n in "qk":
            if f"self_attn.{n}_norm.weight" in one:
                layer[f"self_attention.{n}_layernorm.weight"] = one[f"self_attn.{n}_norm.weight"]
        layers.append(layer)
    return layers


def _mlp(one, prefix):
    """Return `linear_fc1` and `linear_fc2` of a layer, or of one of its experts."""
    gate, up, down = (one[f"{prefix}{n}_proj.weight"] for n in ("gate", "up", "down"))
    return {"linear_fc1.weight": torch.cat([gate, up]), "linear_fc2.weight": down}


def megatron_tensors(path, *, local=False, stacked=True, prefix="", rows=512):
    """Yield tensors of a Megatron checkpoint of a Hugging Face directory: (key, tensor or layers' tensors, stacked).

    `local` uses the names of layers without Transformer Engine. `rows` is the padded vocabulary.
    """
    hf, layers = load_file(Path(path, "model.safetensors")), megatron_layers(path)
    around = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
    tensors = {}
    for name, source in around.items():
        if source in hf:
            padding = torch.full((rows - len(hf[source]), hf[source].shape[1]), 7.0)  # slightly trained, so not zero
            tensors[name] = torch.cat([hf[source], padding])
    tensors["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    for name in layers[0]:
        own = LOCAL_NAMES.get(name, name) if local else name
        if stacked:
            tensors[f"decoder.layers.{own}"] = torch.stack([layer[name] for layer in layers])
        else:
            tensors |= {f"decoder.layers.{i}.{own}": layer[name] for i, layer in enumerate(layers)}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_megatron(path, tensors):
    """Save with Megatron, with the other content of a real checkpoint. Needs a process group of one. Return the path.

    Stacked tensors are saved layer by layer, as Megatron's ranks do.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    state = {"iteration": 3, "args": argparse.Namespace(num_layers=99)}
    for key, tensor in tensors.items():
        if ".layers." in key and tensor.dim() and not any(part.isdecimal() for part in key.split(".")):
            for i, layer in enumerate(tensor):
                place = (0, i, len(tensor))
                state[f"{key}/{i}"] = ShardedTensor.from_rank_offsets(key, layer, place, prepend_axis_num=1)
        else:
            state[key] = ShardedTensor.from_rank_offsets(key, tensor)
    moment = "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
    state["moment"] = ShardedTensor.from_rank_offsets(moment, torch.zeros(3))
    extra = "decoder.layers.mlp.linear_fc1._extra_state"
    state["extra"] = ShardedObject(extra, torch.zeros(0), (1,), (0,))
    state["rng"] = ShardedObject("rng_state", [1, 2], (1,), (0,))
    Path(path).mkdir(parents=True)
    dist_checkpointing.save(state, str(path))
    return str(path)


def nemo_config(path, family):
    """Return NeMo 1's `model_config.yaml` for a Hugging Face directory, with fields of NeMo that we do not read."""
    hf = json.loads(Path(path, "config.json").read_text())
    return {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "tensor_model_parallel_size": 4,
        "encoder_seq_length": hf["max_position_embeddings"],
        "max_position_embeddings": "${.encoder_seq_length}",
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") if family == "qwen3" else None,
        "override_vocab_size": hf["vocab_size"],
        "make_vocab_size_divisible_by": 128,
        "normalization": "rmsnorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "bias": False,
        "activation": "fast-swiglu",
        "qkv_bias": family == "qwen2",
        "qk_layernorm": family == "qwen3",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": int(hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"]),
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        "tokenizer": {"library": "huggingface", "type": "somewhere"},
        **({"scale_positional_embedding": True, "scale_factor": 32.0} if family == "llama3_rope" else {}),
    }


def write_nemo(path, tensors, config):
    """Write a NeMo directory, `model_weights/` and `model_config.yaml`. Return the path."""
    write_megatron(Path(path, "model_weights"), tensors)
    Path(path, "model_config.yaml").write_text(yaml.safe_dump(config))
    return str(path)

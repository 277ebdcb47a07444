"""Released models: read and counted whole, and compared with transformers' logits scaled down.

tests/real_models.json has one line a model: its number of parameters as transformers counts them (tied rows once, no
buffers, no MTP layers) and the fields of its config.json that describe the network. A list by layer holds one period. A
family adds its models there, and to `SMALL` sizes that only it has.
"""

import json
from pathlib import Path

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.models.families import FAMILIES
from tests.tiny_models import NO_TOKENS, known, random_model
from tests.unit.models.test_huggingface import logits_of, transformers_logits

REAL = json.loads((Path(__file__).parents[2] / "real_models.json").read_text())
BY_LAYER = ("layer_types", "no_rope_layers")
LAYERS, HEAD = 6, 16
SMALL = {  # in place of a model's own value
    "num_hidden_layers": LAYERS,
    "vocab_size": 507,
    "intermediate_size": 96,
    "head_dim": HEAD,
    "sliding_window": 5,
    "num_experts": 16,
    "n_routed_experts": 16,
    "num_local_experts": 16,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 80,
    "shared_expert_intermediate_size": 40,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": HEAD,
    "moe_shared_expert_intermediate_size": 40,
    "mamba_num_heads": 16,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "time_step_min": 1e-9,  # transformers raises smaller steps to it without CUDA, the authors' kernels do not
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def write(path, config):
    """Write config.json, with lists by layer of full length. Return the directory."""
    layers = config["num_hidden_layers"]
    lists = {name: (config[name] * layers)[:layers] for name in BY_LAYER if name in config}
    (path / "config.json").write_text(json.dumps(config | lists))
    return str(path)


def scaled(config):
    """Divide layers and widths. Heads keep their ratios; rotary embeddings, routing and multipliers stay."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    few = min(groups, 2)
    sizes = {name: size for name, size in SMALL.items() if config.get(name)}
    sizes |= {"num_attention_heads": few * heads // groups, "num_key_value_heads": few, "initializer_range": 0.1}
    sizes["hidden_size"] = sizes["num_attention_heads"] * HEAD * config["hidden_size"] // (heads * width)
    rope = dict(config.get("rope_scaling") or {})
    for name in rope.keys() & {"short_factor", "long_factor"}:
        rope[name] = rope[name][:: width // HEAD]
    pattern = "".join(dict.fromkeys(config.get("hybrid_override_pattern", ""))) * LAYERS  # each kind in turn
    kinds = {"hybrid_override_pattern": pattern[:LAYERS]} if pattern else {}
    return config | sizes | NO_TOKENS | kinds | ({"rope_scaling": rope} if rope else {})


def family_of(model_type):
    return next(name for name, family in FAMILIES.items() if model_type in (name, *family.other_types))


def test_every_family_has_released_models():
    assert {family_of(row["config"]["model_type"]) for row in REAL.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", REAL)
def test_a_released_model_has_its_number_of_parameters(tmp_path, name):
    from distill_nemo.models.architecture import padded_vocab_size
    from distill_nemo.models.resolve import resolve
    from distill_nemo.planning.parameters import total_parameters

    model = resolve(StudentConfig(write(tmp_path, REAL[name]["config"])))
    padded_rows = (padded_vocab_size(model.vocab_size) - model.vocab_size) * (1 if model.tie_word_embeddings else 2)
    assert total_parameters(model) - padded_rows * model.hidden_size == REAL[name]["parameters"]


@pytest.mark.parametrize("name", [name for name in REAL if known(REAL[name]["config"]["model_type"])])
def test_scaled_down_a_released_model_has_transformers_logits(tmp_path, name):
    from transformers import AutoConfig

    config = scaled(REAL[name]["config"])
    for_transformers = config | {"model_type": family_of(config["model_type"])}
    random_model(AutoConfig.from_pretrained(write(tmp_path, for_transformers))).save_pretrained(tmp_path)
    theirs = transformers_logits(write(tmp_path, for_transformers))  # as the Hub spells it, not as this version does
    path = write(tmp_path, config)
    tolerance = 5e-5 if "linear_key_head_dim" in config else 1e-5  # heads of few channels are divided by their norm
    assert (torch.as_tensor(logits_of(path)) - theirs).abs().max() <= tolerance * theirs.abs().max()

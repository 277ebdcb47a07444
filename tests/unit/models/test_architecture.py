"""Architectures read from `config.json` or `architecture.json`, and refusals by name."""

import copy
import dataclasses
import json

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig, TeacherConfig
from distill_nemo.models.architecture import Experts
from distill_nemo.models.families import FAMILIES
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import OWN_FIELDS, known
from tests.unit.models import config_json

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 507,
}
SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", **SCALING}
SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def resolve_json(path, **change):
    return config_json.resolve_json(path, LLAMA | change)


def test_defaults_without_a_checkpoint():
    from distill_nemo.models.resolve import resolve

    resolved = resolve(StudentConfig(**SHAPE))
    assert (resolved.family, resolved.num_query_groups, resolved.kv_channels) == ("llama", 4, 16)
    assert (resolved.norm_epsilon, resolved.rotary_base, resolved.tie_word_embeddings) == (1e-5, 10000.0, False)
    with pytest.raises(ValueError, match="ffn_hidden_size, vocab_size: set them"):
        resolve(StudentConfig(num_layers=4, hidden_size=64, num_attention_heads=4))


# Spellings of config.json, each with the base (None: the family's default) and the scaling; True stands for LLAMA3,
# False for none.
PLAIN = {"rope_type": "default"}
FAR = {"max_position_embeddings": 131072}
LINEAR = {"rope_type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 1.1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
MSCALE = {"mscale": 0.9, "mscale_all_dim": 0.7, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
    "original_max_position_embeddings": 4096,
}
OTHER_LLAMA3 = LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 1024}
ROPES = {
    "nothing": ({}, (None, False)),
    "transformers 4": ({"rope_theta": 5e5}, (5e5, False)),
    "an integer": ({"rope_theta": 500000}, (5e5, False)),
    "transformers 4, scaled": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, (5e5, True)),
    "transformers 4, null": ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, False)),
    "transformers 5": ({"rope_parameters": {"rope_theta": 5e5, **PLAIN}}, (5e5, False)),
    "transformers 5, scaled": ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, (5e5, True)),
    "transformers 5 without a type": ({"rope_parameters": {"rope_theta": 5e5}}, (5e5, False)),
    "transformers 5 rewritten by 4": (
        {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **PLAIN}},
        (5e5, False),
    ),
    "the same, scaled": (
        {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        (5e5, True),
    ),
    "base within rope_scaling": ({"rope_scaling": {"rope_theta": 5e5, **LLAMA3}}, (5e5, True)),
    "base within and beside rope_scaling": ({"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}}, (5e5, False)),
    "rope_scaling before rope_parameters": (
        {"rope_scaling": {"rope_theta": 5e5, **LLAMA3}, "rope_parameters": {"rope_theta": 1e6, **PLAIN}},
        (5e5, True),
    ),
    "rope_scaling without a base": (
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **PLAIN}},
        (None, True),
    ),
    "rope_scaling without a base, one beside": (
        {"rope_theta": 2e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5}},
        (2e5, True),
    ),
    "an empty rope_scaling": ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, (5e5, True)),
    "an empty rope_parameters": ({"rope_theta": 5e5, "rope_parameters": {}}, (5e5, False)),
    "a null rope_parameters": ({"rope_theta": 5e5, "rope_parameters": None}, (5e5, False)),
    "both as exported": (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        (5e5, True),
    ),
    "type": ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}, (5e5, True)),
    "type and rope_type": ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}, (5e5, True)),
    "another type beside rope_type": ({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **LLAMA3}}, (5e5, True)),
    "default with what llama3 has": ({"rope_theta": 5e5, "rope_scaling": {**SCALING, **PLAIN}}, (5e5, False)),
    "a null partial_rotary_factor": ({"rope_theta": 5e5, "partial_rotary_factor": None}, (5e5, False)),
    "a whole partial_rotary_factor": (
        {"partial_rotary_factor": 1, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, **LLAMA3}},
        (5e5, True),
    ),
    "linear": ({"rope_scaling": LINEAR}, (None, LINEAR)),
    "a whole number": ({"rope_scaling": {"type": "linear", "factor": 2}}, (None, LINEAR | {"factor": 2.0})),
    "dynamic": ({"rope_scaling": DYNAMIC}, (None, DYNAMIC)),
    "llama3 with other numbers": ({"rope_scaling": OTHER_LLAMA3}, (None, OTHER_LLAMA3)),
    "yarn": ({"rope_parameters": {"rope_theta": 1e6, **YARN}}, (1e6, YARN)),
    "yarn with everything": ({"rope_scaling": YARN | MSCALE}, (None, YARN | MSCALE)),
    "yarn with a null": ({"rope_scaling": YARN | {"attention_factor": None, "mscale": None}}, (None, YARN)),
    "yarn with an attention factor": (
        {"rope_scaling": YARN | {"attention_factor": 1.5}},
        (None, YARN | {"attention_factor": 1.5}),
    ),
    "yarn without its original length": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        (None, YARN | {"original_max_position_embeddings": 131072}),
    ),
    "yarn, original length beside": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 2048},
        (None, YARN),
    ),
    "longrope": ({"rope_scaling": LONGROPE}, (None, LONGROPE)),
    "longrope with factors": (
        {"rope_scaling": LONGROPE | {"factor": 8.0, "attention_factor": 1.25}},
        (None, LONGROPE | {"factor": 8.0, "attention_factor": 1.25}),
    ),
    "longrope with a factor": ({"rope_scaling": LONGROPE | {"factor": 8.0}}, (None, LONGROPE | {"factor": 8.0})),
}


@pytest.mark.parametrize("spelling", ROPES)
@pytest.mark.parametrize(
    "family",
    [
        name
        for name, row in FAMILIES.items()
        if "dynamic" in row.rope_types.values() and not row.layer_ropes and row.partial_rotary is None
        if "rope_scaling" not in OWN_FIELDS.get(name, {})
    ],
)
def test_rotary_frequencies_equal_those_of_transformers(tmp_path, family, spelling):
    setup_device()
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from distill_nemo.models.layers.rotary import frequencies

    rope, (base, scaling) = ROPES[spelling]
    config = {"model_type": family, "architectures": None, "head_dim": 24, "num_key_value_heads": 2, **FAR}
    resolved = resolve_json(tmp_path, **copy.deepcopy(config | OWN_FIELDS.get(family, {}) | rope))
    scaling = (LLAMA3 if scaling else None) if isinstance(scaling, bool) else scaling
    base = base or FAMILIES[family].defaults.get("rope_theta", 1e4)
    assert (resolved.rotary_base, resolved.rope_scaling) == (base, scaling)
    ours, factor = frequencies(resolved.ropes[0], 24, 131072)
    if int(transformers.__version__.split(".")[0]) >= 5:  # transformers 4 has no rope_parameters
        theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
        assert torch.equal(ours, theirs.inv_freq) and factor == theirs.attention_scaling


@pytest.mark.parametrize("spelling", ROPES)
def test_rotary_embeddings_are_recorded_and_exported_as_they_were_read(tmp_path, spelling):
    from distill_nemo.models.families.huggingface import to_huggingface
    from distill_nemo.models.resolve import resolve

    rope, _ = ROPES[spelling]
    resolved = resolve_json(tmp_path, head_dim=24, **copy.deepcopy(FAR | rope))
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(resolved, torch.float32)))
    assert resolve(StudentConfig(str(tmp_path))) == resolved
    (tmp_path / "architecture.json").write_text(json.dumps(dataclasses.asdict(resolved.filled(StudentConfig()))))
    assert resolve(StudentConfig(str(tmp_path))) == resolved


NESTED = {"full_attention": {"rope_theta": 5e5, **PLAIN}}
BAD_ROPES = [
    ({"rope_scaling": "llama3"}, "rope_scaling must be an object or null, got 'llama3'"),
    ({"rope_parameters": [LLAMA3]}, "rope_parameters must be an object or null, got [{"),
    ({"rope_parameters": NESTED}, "rope_parameters: ['full_attention'] holds parameters for one type of layer"),
    ({"rope_scaling": NESTED | {"rope_theta": 5e5}}, "rope_scaling: ['full_attention'] holds parameters for one type"),
    ({"rope_theta": None}, "rope_theta must be a positive number, got None"),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": None}}, "rope_theta must be a positive number, got None"),
    ({"rope_theta": "5e5"}, "rope_theta must be a positive number, got '5e5'"),
    ({"rope_theta": True}, "rope_theta must be a positive number, got True"),
    ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
    ({"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf"),
    ({"rope_theta": 10**400}, "rope_theta must be a positive number, got 1000"),
    ({"rope_scaling": SCALING | {"rope_type": None}}, "rope_type must be a string, got None"),
    ({"rope_scaling": SCALING | {"type": {}}}, "rope_scaling: ['type'] holds parameters for one type of layer"),
    ({"rope_scaling": {"rope_type": "ntk", "type": "llama3", **SCALING}}, '"ntk" is not supported; "default", '),
    ({"rope_scaling": {"rope_type": "proportional"}}, '"proportional" is not supported'),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor must be a positive number, got None"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": -1}}, "low_freq_factor must be a positive number, got -1"),
    ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling: factor must be a positive number, got None"),
    ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "rope_scaling: factor must be a positive number, got nan"),
    ({"rope_scaling": LLAMA3 | {"factor": True}}, "rope_scaling: factor must be a positive number, got True"),
    ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling: factor must be at least 1, got 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor must be a positive number, got 1000"),
    (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
        "original_max_position_embeddings = 8192 contradicts 4096 beside it",
    ),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 2048.0}},
        "original_max_position_embeddings must be a positive integer, got 2048.0",
    ),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 2**40}},
        "original_max_position_embeddings must be at most 2,147,483,648",
    ),
    ({"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast must be a positive number, got '32'"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate must be true, false or null, got 1"),
    ({"rope_theta": 1.0, "rope_scaling": YARN}, "gives no frequencies: "),
    ({"rope_scaling": DYNAMIC | {"factor": 1e30}}, "gives frequencies that are not finite"),
    ({"rope_scaling": DYNAMIC, "head_dim": 2}, "gives no frequencies: division by zero"),
    ({"rope_scaling": LONGROPE}, "rope_scaling.short_factor must hold 8 numbers, got 12"),
    ({"rope_scaling": LONGROPE | {"long_factor": 2.0}}, "long_factor must be a list of positive numbers, got 2.0"),
    ({"rope_scaling": LONGROPE | {"long_factor": []}}, "long_factor must be a list of positive numbers, got []"),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0, "2"]}}, "short_factor must be a list of positive numbers"),
    ({"rope_scaling": LONGROPE | {"short_factor": [float("nan")] * 8}}, "short_factor must be a list of positive"),
    ({"rope_scaling": LONGROPE | {"short_factor": [0]}}, "short_factor must be a list of positive numbers, got [0]"),
    ({"partial_rotary_factor": 0.5}, 'partial_rotary_factor = 0.5 is not supported; it must be 1 with family "llama"'),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 is not supported"),
    ({"partial_rotary_factor": "half"}, "partial_rotary_factor must be a positive number, got 'half'"),
    ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25 is not supported"),
    (
        {"partial_rotary_factor": 1.0, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.25}},
        "partial_rotary_factor = 0.25 contradicts 1.0 beside it",
    ),
]


@pytest.mark.parametrize(("rope", "message"), BAD_ROPES, ids=[str(i) for i in range(len(BAD_ROPES))])
def test_rotary_embeddings_that_cannot_be_read_for_certain_are_refused(tmp_path, rope, message):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, **rope)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value) and len(str(raised.value)) < 600


WITH_A_FRACTION = [name for name, row in FAMILIES.items() if row.partial_rotary not in (None, 1.0) and known(name)]


@pytest.mark.parametrize("family", WITH_A_FRACTION)
def test_a_rotated_fraction_that_transformers_does_not_read_is_refused(tmp_path, family):
    model_type = {"model_type": family, "architectures": None, **OWN_FIELDS[family], "head_dim": 24}
    model_type |= {"num_key_value_heads": 2, "num_hidden_layers": 4}
    yarn = {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.75, **YARN}}
    for rope, message in (
        ({"partial_rotary_factor": None}, "partial_rotary_factor = null is not supported"),
        (yarn, f"0.75 contradicts {FAMILIES[family].partial_rotary} of the family, as none stands beside it"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_json(tmp_path, **copy.deepcopy(model_type | rope))
    beside = resolve_json(tmp_path, **copy.deepcopy(model_type | yarn | {"partial_rotary_factor": 0.75}))
    assert beside.ropes[0].partial_rotary_factor == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": "absent"}, "num_attention_heads must be a positive integer, got None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassification']"),
        ({"architectures": "LlamaForCausalLM"}, 'it must be ["LlamaForCausalLM"], null or absent'),
        ({"architectures": [{}]}, "architectures [{}] is not supported"),
        ({"model_type": "gpt_neo" * 100}, 'model_type "gpt_neogpt_neo'),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config with quant_method 'awq' is not supported",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window attention (layer_types"),
        ({"layer_types": 4}, "sliding window attention (layer_types 4)"),
        ({"hidden_size": 256, "num_attention_heads": 6}, "hidden_size = 256 is not divisible by num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not divisible by num_query_groups = 3"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window) is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_a_config_that_would_be_misread_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, **change)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


WRONG_KINDS = ("x", "4", 0, -1, 1.5, True, [], [4], {}, float("nan"), float("inf"), 10**9 * 10**9, 10**400)
EPSILON = {"nemotron_h": "layer_norm_epsilon"}
FLAGS = ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "num_labels")


@pytest.mark.parametrize("field", [*SIZES, *OPTIONAL_SIZES, *FLAGS, "rms_norm_eps", "hidden_act", "model_type"])
def test_a_value_of_the_wrong_kind_is_refused_by_file_and_field(tmp_path, field):
    def is_right(value):
        if field in FLAGS:
            return isinstance(value, bool)
        if field == "rms_norm_eps":
            return value in (1.5, 10**18)
        return field in ("hidden_act", "model_type") and value in ("x", "4")  # of the right type, but unknown

    for value in WRONG_KINDS:
        if is_right(value):
            continue
        with pytest.raises(ValueError) as raised:
            resolve_json(tmp_path, **{field: value})
        message = str(raised.value)
        assert f"{tmp_path}/config.json: {field} must be " in message and len(message) < 400, (value, message)


@pytest.mark.parametrize("field", [*OPTIONAL_SIZES, *FLAGS, "rms_norm_eps", "architectures", "layer_types"])
def test_an_optional_field_may_be_null_or_absent(tmp_path, field):
    assert resolve_json(tmp_path, **{field: None}) == resolve_json(tmp_path, **{field: "absent"})


@pytest.mark.parametrize("family", filter(known, FAMILIES))
def test_fields_that_are_absent_have_the_values_of_transformers(tmp_path, family):
    import transformers

    heads = {"deepseek_v3": 128, "glm4_moe_lite": 20}.get(family, 32)  # these have as many keys
    own = OWN_FIELDS.get(family, {}) | {"model_type": family, "num_attention_heads": heads, "hidden_size": 512}
    absent = resolve_json(tmp_path, architectures="absent", **own)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert absent.num_query_groups == theirs.num_key_value_heads
    names = ("v_head_dim", "head_dim")  # the first with latent attention
    assert absent.kv_channels == next((x for name in names if (x := getattr(theirs, name, None))), 512 // heads)
    assert absent.max_position_embeddings == theirs.max_position_embeddings
    assert absent.norm_epsilon == getattr(theirs, EPSILON.get(family, "rms_norm_eps"))
    assert absent.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "must hold a JSON object, got []"),
        (b'"' + b"x" * 10**6 + b'"', "must hold a JSON object, got 'xxx"),
        (b"[" * 10**5, "cannot be read: maximum recursion depth"),
        (b"\xff\xfe{}", "cannot be read"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b"{}", "model_type must be a string, got None"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "architecture.json"])
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, name, text, message):
    from distill_nemo.models.resolve import resolve

    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(checkpoint=str(tmp_path)))
    message = str(raised.value)
    assert str(tmp_path) in message and len(message) < 400
    assert message in message or (name, text) == ("architecture.json", b"{}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 10**9, "num_layers must be at most 10,000, got 1000000000"),
        ("num_layers", "4", "num_layers must be int | None, got '4'"),
        ("hidden_size", [64], "hidden_size must be int | None, got [64]"),
        ("rotary_base", {}, "rotary_base must be float | None, got {}"),
        ("rotary_base", 10**400, "rotary_base must be float | None, got 1000"),
        ("rope_scaling", "llama3", "rope_scaling must be dict[str, Any] | None, got 'llama3'"),
        ("rope_scaling", {"rope_type": {}}, "is not supported"),
        ("block_configs", [1], "block_configs must be list[dict[str, Any]] | None, got [1]"),
        ("family", 7, "family must be str | None, got 7"),
    ],
)
def test_a_description_of_ours_is_believed_no_more_than_others(tmp_path, field, value, message):
    from distill_nemo.models.resolve import resolve

    own = dataclasses.asdict(resolve(StudentConfig(**SHAPE)).filled(StudentConfig())) | {field: value}
    (tmp_path / "architecture.json").write_text(json.dumps(own))
    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


def test_our_own_description_is_read_back_and_checked(tmp_path):
    from distill_nemo.models.resolve import resolve

    resolved = resolve(StudentConfig(family="qwen3", rotary_base=1e6, **SHAPE))
    own = tmp_path / "architecture.json"
    recorded = dataclasses.asdict(resolved.filled(StudentConfig()))
    own.write_text(json.dumps(recorded))
    again = resolve(StudentConfig(checkpoint=str(tmp_path)))
    assert again == resolved
    with pytest.raises(ValueError, match=r"rotary_base = 5\.0 contradicts"):
        resolve(StudentConfig(checkpoint=str(tmp_path), rotary_base=5.0))
    with pytest.raises(ValueError, match=r"rope_scaling = .* contradicts .* says None"):
        resolve(StudentConfig(checkpoint=str(tmp_path), rope_scaling=LLAMA3))
    own.write_text(json.dumps(recorded | {"num_layer": 4}))
    with pytest.raises(ValueError, match=r'architecture.json: num_layer".*num_layers'):
        resolve(StudentConfig(checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers must be above 0, got 0"),
        ("num_attention_heads", 0, "num_attention_heads must be above 0"),
        ("rotary_base", -1.0, "rotary_base must be above 0, got -1.0"),
        ("init_std", float("nan"), "init_std must be above 0, got nan"),
        ("kv_channels", 7, "kv_channels = 7 is not even"),
        ("rope_scaling", LINEAR | {"low_freq_factor": 1.0}, "rope_scaling: ['low_freq_factor'] is not read with type"),
        ("rope_scaling", LINEAR | {"rope_theta": 1e6}, "rope_scaling: rope_theta is not read here; set rotary_base"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_scaling: original_max_position_embeddings must"),
        ("hidden_size", 3, "kv_channels = 0 is not even"),
    ],
)
def test_sizes_that_no_model_has_are_refused(field, value, message):
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(**SHAPE | {field: value}))
    assert f"student.{message}" in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads = 4 is not divisible by parallelism.tensor"),
        ({"pipeline_model_parallel_size": 5}, "num_layers = 4 cannot fill"),
    ],
)
def test_a_layout_that_does_not_divide_a_loaded_architecture_is_refused(tmp_path, layout, message):
    setup_device()
    from distill_nemo.models.megatron import transformer_config

    with pytest.raises(ValueError, match=message):
        transformer_config(resolve_json(tmp_path), ParallelismConfig(**layout), torch.float32)


def test_megatron_config_by_family():
    setup_device()
    from distill_nemo.models.architecture import padded_vocab_size
    from distill_nemo.models.megatron import transformer_config
    from distill_nemo.models.resolve import resolve

    flags = {}
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        shape = SHAPE | (EXPERTS if family == "qwen3_moe" else {})
        config = transformer_config(resolve(StudentConfig(family=family, **shape)), ParallelismConfig(), torch.float32)
        assert config.calculate_per_token_loss and not config.add_bias_linear and config.gated_linear_unit
        flags[family] = (config.add_qkv_bias, config.qk_layernorm)
    qwen3 = (False, True)
    assert flags == {"llama": (False, False), "qwen2": (True, False), "qwen3": qwen3, "qwen3_moe": qwen3}
    assert [padded_vocab_size(size) for size in (1, 128, 507, 512, 513)] == [128, 128, 512, 512, 640]


@pytest.mark.parametrize(
    ("change", "normalised"),
    [({}, True), ({"num_experts": "absent", "num_local_experts": 4, "norm_topk_prob": "absent"}, False)],
    ids=["transformers 4", "transformers 5, by default"],
)
def test_experts_are_read_and_written(tmp_path, change, normalised):
    setup_device()
    from distill_nemo.models.families.huggingface import from_huggingface, to_huggingface
    from distill_nemo.models.megatron import transformer_config

    resolved = resolve_json(tmp_path, **(QWEN3_MOE | change))
    assert resolved.experts == Experts(*EXPERTS.values(), norm_topk_prob=normalised)
    assert resolved.ffn_hidden_size == 96
    written = to_huggingface(resolved, torch.float32)
    again = from_huggingface(written, tmp_path)
    assert vars(resolved.filled(TeacherConfig())).items() >= again.items()
    config = transformer_config(resolved, ParallelismConfig(), torch.float32)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (4, 2, 48)
    assert config.moe_router_pre_softmax is not normalised
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": "absent"}, "num_experts must be a positive integer, got None"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive integer, got 0"),
        ({"num_experts": 10**9}, "num_experts must be at most 10,000, got 1000000000"),
        ({"num_experts": 9000, "num_hidden_layers": 9000}, "times num_experts = 9000 must be at most 200,000"),
        ({"num_experts": "4"}, "num_experts must be a positive integer, got '4'"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true, false or null, got 'yes'"),
        ({"decoder_sparse_step": {"a": 1}}, "decoder_sparse_step must be int, got {'a': 1}"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        ({"decoder_sparse_step": 5}, "decoder_sparse_step = 5 and mlp_only_layers = [] leave no layer with experts"),
        ({"mlp_only_layers": {}}, "mlp_only_layers must be list[int], got {}"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is above num_experts = 4"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob = True with num_experts_per_tok = 1"),
        ({"model_type": "qwen4_moe"}, "Did you mean qwen3_moe"),
    ],
)
def test_experts_that_are_not_supported_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError) as raised:
        resolve_json(tmp_path, **(QWEN3_MOE | change))
    assert message in str(raised.value)


def test_fields_of_experts_go_with_a_family_that_has_them():
    from distill_nemo.models.resolve import resolve

    random = resolve(StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS | {"ffn_hidden_size": None})))
    assert (random.ffn_hidden_size, random.experts.norm_topk_prob) == (48, True)
    with pytest.raises(ValueError, match="student: the model needs num_experts_per_tok: set them"):
        resolve(StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS | {"num_experts_per_tok": None})))
    with pytest.raises(ValueError, match=r'num_experts = 4: family "qwen3" has no experts; .* or qwen3_moe'):
        resolve(StudentConfig(family="qwen3", num_experts=4, **SHAPE))
    with pytest.raises(ValueError, match=r"student: some of its layers have no experts; set ffn_hidden_size"):
        dense = {"ffn_hidden_size": None, "family_fields": {"mlp_only_layers": [1]}}
        resolve(StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS | dense)))
    blocks = [{"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 96}}] * 4
    with pytest.raises(ValueError, match="block_configs: layers that differ are not supported with experts"):
        resolve(StudentConfig(family="qwen3_moe", block_configs=blocks, **(SHAPE | EXPERTS)))


def test_a_layout_that_does_not_divide_experts_is_refused(tmp_path):
    setup_device()
    from distill_nemo.models.megatron import transformer_config

    layout = ParallelismConfig(expert_model_parallel_size=3)
    with pytest.raises(ValueError, match=r"num_experts = 4 is not divisible by parallelism\.expert"):
        transformer_config(resolve_json(tmp_path, **QWEN3_MOE), layout, torch.float32)


def test_a_dense_model_beside_one_with_experts_is_not_split_over_expert_parallel_ranks():
    setup_device()
    from distill_nemo.models.megatron import transformer_config
    from distill_nemo.models.resolve import resolve

    parallelism = ParallelismConfig(expert_model_parallel_size=2)
    dense, sparse = StudentConfig(**SHAPE), StudentConfig(family="qwen3_moe", **(SHAPE | EXPERTS))
    sizes = [transformer_config(resolve(m), parallelism, torch.float32) for m in (dense, sparse)]
    assert [config.expert_model_parallel_size for config in sizes] == [1, 2]


def test_documents_are_not_kept_apart_where_a_state_reaches_over_them(tmp_path):
    model = resolve_json(tmp_path)
    assert not model.needs_own_attention and model.with_documents_apart().needs_own_attention
    layers = (*model.layers[:-1], dataclasses.replace(model.layers[-1], mixer="mamba"))
    with pytest.raises(
        ValueError, match=rf"a mamba in layer {len(layers) - 1}, .*reset_at_documents=false, .*without pack"
    ):
        dataclasses.replace(model, layers=layers).with_documents_apart()

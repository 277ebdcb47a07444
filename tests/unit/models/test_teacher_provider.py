"""Teachers of every kind of checkpoint, written here, give transformers' logits."""

import contextlib
import functools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import (
    CheckpointConfig,
    DistillationConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.tiny_models import megatron_tensors, nemo_config, write_hf, write_megatron, write_nemo

# setup_device silences these in runs; pytest resets the filters for every test.
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor")
FAMILIES = ("llama3_rope", "llama_tied", "qwen2", "qwen3")
WITH_EXPERTS = (*FAMILIES, "yarn_rope", "smollm3", "qwen3_moe")  # NeMo's model_config.yaml of the last is refused
SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
LLAMA = {"vocab_size": 507, "rotary_base": 10000.0, "norm_epsilon": 1e-6, **SHAPE}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TOKENS = (torch.arange(32).view(2, 16) * 37 + 11) % 507


@contextlib.contextmanager
def groups(layout=None):
    """Set up process groups and seeds as a run does."""
    setup_device()
    with process_groups(ParallelismConfig(**layout or {})):
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        yield


@pytest.fixture(scope="module", autouse=True)
def alone():
    with groups():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {family: write_hf(root / family, family) for family in ("llama", *WITH_EXPERTS)}


def described(path):
    """Return the architecture of a Hugging Face directory as a user would write it into the config."""
    from distill_nemo.models.resolve import resolve

    return vars(resolve(TeacherConfig(checkpoint=path)).filled(TeacherConfig()))


def provide(config, layout=None):
    from megatron.core import parallel_state as ps

    from distill_nemo.models.provider import _teacher_provider

    return _teacher_provider(config, arguments(ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage(), layout))


def arguments(first=True, last=True, layout=None):
    where = {"pre_process": first, "post_process": last, "parallel_output": False, "vp_stage": None}
    return {**where, "parallelism": ParallelismConfig(**layout or {}), "dtype": torch.float32}


@torch.no_grad()
def logits_of(teacher):
    """Return `[b, s, V]` of the whole model; None except on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(_, stage):
        output = stage(TOKENS, torch.arange(16).expand(2, -1), None)
        return output, lambda x: (x.sum(), torch.tensor(1), {"logits": x})

    outputs = get_forward_backward_func()(
        forward_step_func=step, data_iterator=None, model=[teacher], num_microbatches=1, seq_length=16,
        micro_batch_size=2, forward_only=True,
    )  # fmt: skip
    return outputs[0]["logits"][..., :507] if outputs else None


@torch.no_grad()
def assert_as_transformers(logits, path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")(TOKENS).logits
    assert theirs.std() > 0.1, "a reference that tells teachers apart"
    assert (torch.as_tensor(logits) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_a_hugging_face_teacher_has_transformers_logits(models, family):
    assert_as_transformers(logits_of(provide(TeacherConfig(models[family]))), models[family])


STORED = {
    "Transformer Engine's names": {},
    "local names": {"local": True},
    "layer by layer": {"stacked": False},
    "local names, layer by layer": {"local": True, "stacked": False},
    "NeMo 2's prefix, other padding": {"prefix": "module.", "rows": 768},
    "no padding": {"rows": 507},
}


@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.parametrize("stored", STORED)
def test_a_megatron_distributed_checkpoint_gives_transformers_logits(models, tmp_path, family, stored):
    path = write_megatron(tmp_path / "m", megatron_tensors(models[family], **STORED[stored]))
    teacher = provide(TeacherConfig(**described(models[family]) | {"checkpoint": path}))
    assert_as_transformers(logits_of(teacher), models[family])


def test_bfloat16_weights_load_into_a_float32_teacher(models, tmp_path):
    rounded = write_hf_edited(
        tmp_path / "hf", lambda t: t.update({k: v.bfloat16().float() for k, v in t.items()}), models["llama"]
    )
    tensors = {name: tensor.bfloat16() for name, tensor in megatron_tensors(rounded).items()}
    teacher = provide(TeacherConfig(**LLAMA, checkpoint=write_megatron(tmp_path / "m", tensors)))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert_as_transformers(logits_of(teacher), rounded)


@pytest.mark.parametrize("family", FAMILIES)
def test_nemo_directory_states_its_architecture(models, tmp_path, family):
    tensors = megatron_tensors(models[family], prefix="model.")
    path = write_nemo(tmp_path / "m", tensors, nemo_config(models[family], family))
    assert described(path)["family"] == family.split("_")[0].removesuffix("3" if "rope" in family else "")
    assert_as_transformers(logits_of(provide(TeacherConfig(path))), models[family])


def test_modelopt_keeps_a_config_beside_a_tracker_and_a_teacher_of_its_own_inside(models, tmp_path):
    """The student of a ModelOpt run is the next run's teacher. The old teacher and the projections are not loaded."""
    tensors = megatron_tensors(models["llama"])
    tensors |= {f"_teacher_model.{name}": torch.zeros(3) for name in tensors}
    tensors["_loss_modules.1.projection.weight"] = torch.zeros(3, 3)
    write_megatron(tmp_path / "m" / "iter_0000030", tensors)
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text("30\n")
    config = {name: value for name, value in LLAMA.items() if name != "norm_epsilon"}
    config |= {"seq_length": 128, "norm_epsilon": 1e-6, "swiglu": True, "disable_bias_linear": True}
    config |= {"untie_embeddings_and_output_weights": True, "padded_vocab_size": 512}
    (tmp_path / "m" / "model_config.yaml").write_text(json.dumps(config))
    assert_as_transformers(logits_of(provide(TeacherConfig(str(tmp_path / "m")))), models["llama"])


def save_ours(inputs, output, layout):
    with groups(layout):
        _save_ours(inputs, output, ParallelismConfig(**layout))


def _save_ours(inputs, output, parallelism):
    """Save a checkpoint like that of a run with a hidden loss: optimizer states, a projection, random states."""
    from distill_nemo.checkpoint.save import CheckpointWriter
    from distill_nemo.checkpoint.state import _allocate_adam_state
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.setup import build_train_state

    run = RunConfig(str(output), StudentConfig(inputs["qwen3"]), TeacherConfig(inputs["wide"]))
    hidden = ["decoder.final_layernorm:decoder.final_layernorm"]
    run.distillation = DistillationConfig(hidden_loss="mse", hidden_layers=hidden, hidden_weight=1.0)
    run.parallelism, run.checkpoint, run.data.sequence_length = parallelism, CheckpointConfig(export=False), 32
    run.optimizer = OptimizerConfig(lr=1e-3)
    run, models = resolve_models(run)
    train_state = build_train_state(run, models, torch.float32, load_weights=True)
    _allocate_adam_state(train_state.optimizer)
    writer = CheckpointWriter(Path(output, "checkpoints"), run)
    writer.save(7, train_state.unwrapped, train_state.optimizer, train_state.scheduler, {"step": 7})
    writer.close()


def logits_at(path, layout):
    """Return every rank's logits of a teacher at a layout (None before the last stage)."""
    with groups(layout):
        logits = logits_of(provide(TeacherConfig(path), layout))
        return None if logits is None else logits.numpy()


@pytest.fixture(scope="module")
def wide(models, tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("wide") / "m", "llama", layers=2, width=96, heads=6, groups=2)


@pytest.mark.parametrize("saved", [None, TP2, PP2], ids=["saved alone", "saved at tp2", "saved at pp2"])
def test_our_own_checkpoint_at_every_layout(models, wide, two, tmp_path, saved):
    inputs = {"qwen3": models["qwen3"], "wide": wide}
    if saved is None:
        _save_ours(inputs, tmp_path, ParallelismConfig())
    else:
        two.run(save_ours, inputs, tmp_path, saved)
    for path in (tmp_path, tmp_path / "checkpoints" / "step_00000007"):
        assert_as_transformers(logits_of(provide(TeacherConfig(str(path)))), models["qwen3"])
    for layout in (TP2, PP2):
        if layout != saved:
            for logits in two.run(logits_at, str(tmp_path), layout):
                if logits is not None:
                    assert_as_transformers(logits, models["qwen3"])


@pytest.mark.parametrize(
    ("family", "stored"),
    [("llama_tied", {"rows": 768}), ("qwen2", {"local": True, "stacked": False, "rows": 507})],
    ids=["tied, stacked", "layer by layer"],
)
def test_nemo_directory_at_tp2_and_pp2(models, two, tmp_path, family, stored):
    tensors = megatron_tensors(models[family], prefix="model.", **stored)
    path = write_nemo(tmp_path / "m", tensors, nemo_config(models[family], family))
    for layout in (TP2, PP2):
        results = [logits for logits in two.run(logits_at, path, layout) if logits is not None]
        assert len(results) == (2 if layout is TP2 else 1)
        for logits in results:
            assert_as_transformers(logits, models[family])


def test_frozen_and_of_its_own_depth_width_and_heads(models, tmp_path):
    """A NeMo teacher differs from its student in depth, width and heads."""
    from distill_nemo.models.provider import model_provider

    path = write_nemo(tmp_path / "m", megatron_tensors(models["llama"]), nemo_config(models["llama"], "llama"))
    student = StudentConfig(num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=3, vocab_size=507)
    model = model_provider(student=student, teacher=TeacherConfig(path), parallelism=ParallelismConfig()).train()
    teacher = model.teacher_model
    assert (len(teacher.decoder.layers), teacher.config.hidden_size, teacher.config.num_attention_heads) == (4, 64, 4)
    assert (len(model.decoder.layers), model.config.hidden_size, model.config.num_attention_heads) == (2, 48, 3)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert model.training and all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_the_provider_of_a_teacher_can_be_pickled(models):
    from distill_nemo.models.provider import _teacher_provider

    provider = functools.partial(_teacher_provider, TeacherConfig(models["llama"]), arguments())
    teacher = pickle.loads(pickle.dumps(provider))()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_as_transformers(logits_of(teacher), models["llama"])


def write_ours(path, tensors, source):
    write_megatron(path, tensors)
    (path / "architecture.json").write_text(json.dumps(described(source)))
    return str(path)


def write_hf_edited(path, change, source):
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return str(path)


def broken(kind, path, change, source, **stored):
    """Return the config of a teacher of `kind` whose tensors were changed."""
    if kind == "Hugging Face":
        return TeacherConfig(write_hf_edited(path, change, source))
    prefix = "" if kind == "Megatron" else "model."
    tensors = megatron_tensors(source, prefix=prefix, **stored)
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    change(inner)
    tensors = {prefix + name: tensor for name, tensor in inner.items()}
    if kind == "NeMo":
        return TeacherConfig(write_nemo(path, tensors, nemo_config(source, "llama")))
    if kind == "ours":
        return TeacherConfig(write_ours(path, tensors, source))
    return TeacherConfig(**LLAMA, checkpoint=write_megatron(path, tensors))


def refused(config):
    with pytest.raises(ValueError) as raised:
        provide(config)
    text = str(raised.value)
    assert len(text) < 2000 and text.count("\n") <= 7, "one screen"
    return text


NAMES = {  # a norm, a matrix, the added tensor
    "Hugging Face": ("model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.bias"),
    "Megatron": ("decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.bias"),
}
NAMES |= {"NeMo": NAMES["Megatron"], "ours": NAMES["Megatron"]}


@pytest.mark.parametrize("kind", NAMES)
def test_missing_extra_and_misshapen_tensors_are_named(models, tmp_path, kind):
    norm, matrix, surplus = NAMES[kind]
    ok = provide(broken(kind, tmp_path / "whole", lambda t: None, models["llama"]))
    assert_as_transformers(logits_of(ok), models["llama"])
    for number, (change, message) in enumerate(
        [
            (lambda t: t.pop(norm), f"missing: {norm} (64,)"),
            (lambda t: t.pop(matrix), f"missing: {matrix}"),
            (lambda t: t.update({surplus: torch.ones(4, 2)}), f"extra: {surplus} (4, 2)"),
            (lambda t: t.update({norm: torch.ones(3)}), f"{norm} has shape (3,), needs (64,)"),
            (lambda t: t.update({matrix: t[matrix][..., :63].contiguous()}), f"{matrix} has shape"),
        ]
    ):
        assert message in refused(broken(kind, tmp_path / str(number), change, models["llama"]))


FC2 = "decoder.layers.{}.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FC2.format(1)), "missing: decoder.layers.1.mlp.linear_fc2.weight (64, 96)"),
        (lambda t: t.update({FC2.format(4): torch.ones(64, 96)}), "it holds 5 layers, num_layers = 4"),
        (lambda t: t.update({FC2.format(3): torch.ones(64, 95)}), "layers.3.mlp.linear_fc2.weight has shape (64, 95)"),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.3." in n], "it holds 3 layers, num_layers = 4"),
        (lambda t: t.update({"output_layer.weight": torch.ones(506, 64)}), "output_layer.weight has shape (506, 64)"),
        (lambda t: t.update({"output_layer.weight": torch.ones(8800, 64)}), "output_layer.weight has shape (8800, 64)"),
        (lambda t: t.pop("output_layer.weight"), "missing: output_layer.weight (507, 64)"),
    ],
)
def test_layers_stored_one_by_one(models, tmp_path, change, message):
    assert message in refused(broken("Megatron", tmp_path / "m", change, models["llama"], stacked=False))


def test_extra_tensors_outside_the_prefix_count_too(models, tmp_path):
    tensors = megatron_tensors(models["llama"], prefix="model.") | {"reward_head.weight": torch.ones(2)}
    path = write_nemo(tmp_path / "m", tensors, nemo_config(models["llama"], "llama"))
    assert "extra: reward_head.weight" in refused(TeacherConfig(path))


@pytest.mark.parametrize("layers", [3, 6])
def test_another_depth_is_refused_not_cut(models, tmp_path, layers):
    source = write_hf(tmp_path / "hf", layers=layers)
    path = write_megatron(tmp_path / "m", megatron_tensors(source))
    assert f"it holds {layers} layers, num_layers = 4" in refused(TeacherConfig(**LLAMA, checkpoint=path))


def errors_at(config, layout):
    with groups(layout):
        try:
            provide(config, layout)
        except ValueError as error:
            return str(error)
        return "loaded"


def test_every_stage_sees_what_is_wrong_on_another(models, two, tmp_path):
    config = broken("Megatron", tmp_path / "a", lambda t: t.pop("output_layer.weight"), models["llama"])
    assert all("missing: output_layer.weight" in error for error in two.run(errors_at, config, PP2))
    config = broken("ours", tmp_path / "b", lambda t: t.update(surplus=torch.ones(2)), models["llama"])
    assert all("extra: surplus (2,)" in error for error in two.run(errors_at, config, PP2))


CORRUPT = {
    ".metadata is missing, corrupt or truncated": lambda path: _cut(path / ".metadata", 200),
    "names files that are not there: __0_0.distcp": lambda path: (path / "__0_0.distcp").unlink(),
    "__0_0.distcp is truncated": lambda path: _cut(path / "__0_0.distcp", 1000),
    "cannot be read, and may be corrupt: UnpicklingError": lambda path: _zero(path / "__0_0.distcp"),
}


def _cut(file, size):
    assert file.stat().st_size > size
    file.write_bytes(file.read_bytes()[:size])


def _zero(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("message", CORRUPT)
def test_a_corrupt_checkpoint_is_refused_by_file(models, tmp_path, message):
    path = write_nemo(tmp_path / "m", megatron_tensors(models["llama"]), nemo_config(models["llama"], "llama"))
    CORRUPT[message](Path(path, "model_weights"))
    assert message in refused(TeacherConfig(path))


def test_what_is_no_checkpoint_is_refused_by_path(models, tmp_path):
    assert f"not found: {tmp_path}/none" in refused(TeacherConfig(str(tmp_path / "none")))
    assert "is not a checkpoint that can be read" in refused(TeacherConfig(str(tmp_path)))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("thirty")
    assert 'must hold an iteration or "release", got "thirty"' in refused(TeacherConfig(str(tmp_path)))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9" * 5000)  # more than Python reads as a number
    assert 'must hold an iteration or "release", got "999' in refused(TeacherConfig(str(tmp_path)))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("30")
    assert "iter_0000030 is not a checkpoint" in refused(TeacherConfig(str(tmp_path)))
    (tmp_path / "model_weights").mkdir()
    (tmp_path / "model_config.yaml").write_text(json.dumps(nemo_config(models["llama"], "llama")))
    assert ".metadata is missing" in refused(TeacherConfig(str(tmp_path)))


def test_what_a_megatron_checkpoint_does_not_say_is_asked_for(models, tmp_path):
    path = write_megatron(tmp_path / "m", megatron_tensors(models["llama"]))
    names = "num_layers, hidden_size, ffn_hidden_size, num_attention_heads, vocab_size, rotary_base, norm_epsilon"
    assert f"{path} does not say {names}: set them" in refused(TeacherConfig(path))
    shown = LLAMA | {"rotary_base": None}
    assert f"{path} does not say rotary_base: set" in refused(TeacherConfig(**shown, checkpoint=path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "layernorm1p"}, "normalization = layernorm1p is not supported; rmsnorm is"),
        ({"activation": "gelu"}, "activation = gelu is not supported; swiglu or fast-swiglu is"),
        ({"bias": True}, "bias = True is not supported; False is"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = learned_absolute"),
        ({"rotary_percentage": 0.5}, "rotary_percentage = 0.5"),
        (
            {"seq_len_interpolation_factor": 4, "use_rope_scaling": True},
            "seq_len_interpolation_factor = 4 together with",
        ),
        ({"num_moe_experts": 8}, "num_moe_experts = 8"),
        ({"window_size": [4096, 0]}, "window_size = [4096, 0] is not supported; null is"),
        ({"mcore_gpt": False}, "mcore_gpt = False"),
        ({"qkv_bias": True, "qk_layernorm": True}, "qk_layernorm together with a bias"),
        ({"num_layers": "four"}, "num_layers must be a positive integer, got 'four'"),
        ({"num_layers": 4.5}, "num_layers must be a positive integer, got 4.5"),
        ({"layernorm_epsilon": 0}, "layernorm_epsilon must be a positive number, got 0"),
        ({"ffn_hidden_size": "${multiply:4, ${.hidden_size}}"}, "ffn_hidden_size must be a positive integer"),
        ({"override_vocab_size": None}, "does not say vocab_size: set them beside checkpoint"),
    ],
)
def test_a_nemo_config_that_would_be_misread_is_refused_by_field(models, tmp_path, change, message):
    (tmp_path / "model_weights").mkdir()
    config = nemo_config(models["llama"], "llama") | change
    (tmp_path / "model_config.yaml").write_text(json.dumps(config))
    assert message in refused(TeacherConfig(str(tmp_path)))


def test_nemo_config_in_its_variants(models, tmp_path):
    from distill_nemo.models.resolve import resolve

    def read(**change):
        text = json.dumps(nemo_config(models["llama"], "llama") | change)
        (tmp_path / "model_config.yaml").write_text(text.replace('"1e-5"', "1e-5"))  # YAML 1.1: text, not a number
        return resolve(TeacherConfig(str(tmp_path)))

    (tmp_path / "model_weights").mkdir()
    assert read().max_position_embeddings == 128, "${.encoder_seq_length}"
    assert read(layernorm_epsilon="1e-5").norm_epsilon == 1e-5
    assert read(max_position_embeddings=None, encoder_seq_length=None, seq_length=64).max_position_embeddings == 64
    assert read(num_query_groups=1, group_query_attention=False).num_query_groups == 4
    assert read(num_query_groups=None).num_query_groups == 4
    assert read(use_rope_scaling=True, rope_scaling_factor=32.0).rope_scaling["factor"] == 32.0
    assert read(scale_positional_embedding=True).rope_scaling["factor"] == 8.0
    assert read(scale_positional_embedding=False).rope_scaling is None
    assert read(seq_len_interpolation_factor=4).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert read(seq_len_interpolation_factor=1).rope_scaling is None
    assert (read(qkv_bias=True).family, read(qk_layernorm=True).family, read().family) == ("qwen2", "qwen3", "llama")
    (tmp_path / "model_config.yaml").write_text("num_layers: [")
    assert "model_config.yaml cannot be read" in refused(TeacherConfig(str(tmp_path)))
    (tmp_path / "model_config.yaml").write_text("- num_layers")
    assert "must hold a mapping of fields" in refused(TeacherConfig(str(tmp_path)))

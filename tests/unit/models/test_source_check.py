"""Imports compared with transformers: a right one passes, whole or cut, and any misreading is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distill_nemo.config import ExportConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import FAMILIES, write_hf
from tests.training import metrics, tiny_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {family: write_hf(root / family, family) for family in (*FAMILIES, "qwen3_moe_not_normalised")}


def checked(path, **change):
    setup_device()
    from distill_nemo.models.resolve import resolve
    from distill_nemo.models.source_check import check_source

    check_source(resolve(StudentConfig(checkpoint=str(path), **change)))


def always_cut(patch):
    setup_device()
    from distill_nemo.models import source_check

    patch.setattr(source_check, "WHOLE", 0)
    small = {"num_layers": 1, "num_experts": 3, "vocab_size": 100, "ffn_hidden_size": 32, "moe_ffn_hidden_size": 16}
    patch.setattr(source_check, "CUT", small)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe_not_normalised"])
def test_a_model_that_is_read_as_transformers_reads_it_passes(models, family):
    if family == "deepseek_v3" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 prefers experts of other groups to a sum of score and bias below 0")
    checked(models[family])


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe_not_normalised"])
def test_so_does_a_part_of_it(models, monkeypatch, family):
    always_cut(monkeypatch)
    checked(models[family], vocab_size=300)  # the last rows are left out


def test_rows_that_are_left_out_are_not_compared(models):
    checked(models["llama"], vocab_size=300)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_no_other_reading(tmp_path, value):
    path = Path(write_hf(tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: its logits are NaN or infinite, in transformers too"):
        checked(path)


def misread(patch, **wrong):
    """Let our reader of config.json return other values."""
    setup_device()
    from distill_nemo.models import resolve
    from distill_nemo.models.families.huggingface import from_huggingface

    patch.setattr(resolve, "from_huggingface", lambda config, where: from_huggingface(config, where) | wrong)


MISREADINGS = {
    "base": ("llama", {"rotary_base": 5e5}),
    "scaling left out": ("llama3_rope", {"rope_scaling": None}),
    "epsilon": ("qwen3", {"norm_epsilon": 1e-3}),
    "weights of experts": ("qwen3_moe", {"norm_topk_prob": False}),
    "experts of a token": ("qwen3_moe", {"num_experts_per_tok": 3}),
}


@pytest.mark.parametrize("wrong", MISREADINGS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_misread_configuration_is_refused(models, monkeypatch, wrong, cut):
    family, values = MISREADINGS[wrong]
    misread(monkeypatch, **values)
    if cut:
        always_cut(monkeypatch)
    with pytest.raises(ValueError, match=r"is read differently by transformers .* than here: the logits are") as raised:
        checked(models[family])
    assert models[family] in str(raised.value)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 opens it")
def test_what_transformers_cannot_open_is_refused_in_its_words(tmp_path):
    """6 heads of 48 in a hidden size of 256, which Megatron could compute."""
    setup_device()
    from distill_nemo.models.families.tensors import hf_shapes
    from distill_nemo.models.resolve import resolve

    source = Path(write_hf(tmp_path / "m", "llama", width=64))
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").unlink()
    shapes = hf_shapes(resolve(StudentConfig(checkpoint=str(source))))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"/m cannot be opened by transformers .*number of attention heads \(6\)"):
        checked(source)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 does not look at it")
def test_what_transformers_cannot_run_is_refused_in_its_words(tmp_path):
    source = Path(write_hf(tmp_path / "m", "llama"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    with pytest.raises(ValueError, match=r"/m cannot be run by transformers .*: 'tuple' object has no attribute"):
        checked(source)


def test_a_padding_token_without_a_row_does_not_matter(tmp_path):
    """Some fine-tuned models name one. Training never reads it."""
    source = Path(write_hf(tmp_path / "m", layers=1))
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": 507, "eos_token_id": [506, 600]}
    (source / "config.json").write_text(json.dumps(config))
    checked(source)


def ending(function, patch_values, *args):
    """Return the refusal of `function(*args)` while configurations are misread, or None."""
    with pytest.MonkeyPatch.context() as patch:
        misread(patch, **patch_values)
        try:
            function(*args)
        except ValueError as error:
            return str(error)
    return None


def trained(inputs, output, tensor=1):
    from distill_nemo.training.entry import run_config

    config = tiny_run(inputs, output, steps=4)
    config.parallelism.tensor_model_parallel_size = tensor
    run_config(config)


def evaluated(inputs):
    from distill_nemo.training.evaluate import evaluate_student

    evaluate_student(StudentConfig(str(inputs / "student")), str(inputs / "valid"), None, 32, 8)


def exported(source, output):
    from distill_nemo.checkpoint.export import export

    export(ExportConfig(str(source), str(output)))


WRONG = {"rotary_base": 5e5}
REFUSAL = "is read differently by transformers"


def test_train_evaluate_and_export_refuse_a_misread_source(inputs, one, tmp_path):
    (message,) = one.run(ending, trained, WRONG, inputs, tmp_path / "run")
    assert REFUSAL in message and not (tmp_path / "run").exists()
    (message,) = one.run(ending, evaluated, WRONG, inputs)
    assert REFUSAL in message
    (message,) = one.run(ending, exported, WRONG, inputs / "student", tmp_path / "export")
    assert REFUSAL in message and not (tmp_path / "export").exists()


def test_every_rank_refuses_a_misread_source(inputs, two, tmp_path):
    messages = two.run(ending, trained, WRONG, inputs, tmp_path / "run", 2)
    assert messages[0] == messages[1] and REFUSAL in messages[0]
    two.run(trained, inputs, tmp_path / "run", 2)  # only rank 0 has been in another process group before
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_the_export_of_a_run_is_held_against_the_source_of_its_student(inputs, one, tmp_path):
    """The run predates the check, and its export reproduces the run's own logits."""
    one.run(trained, inputs, tmp_path / "run")
    (described,) = Path(tmp_path, "run", "checkpoints").glob("step_*/architecture.json")
    described.write_text(json.dumps(json.loads(described.read_text()) | WRONG))
    sums = described.with_name("SHA256SUMS")
    sums.write_text("".join(x for x in sums.read_text().splitlines(True) if "architecture.json" not in x))
    with pytest.raises(ValueError, match=r"did not read its student as transformers does.*rotary_base = 500000"):
        one.run(exported, tmp_path / "run", tmp_path / "export")
    assert not (tmp_path / "export").exists()

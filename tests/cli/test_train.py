"""Recipes for full-size models, shrunk onto tiny ones: output and files of a run, and other ways to start it.

All else of a recipe stays: parallel layout, optimizer, losses.
"""

import re
from dataclasses import asdict, replace

import fiddle as fdl
import pytest
import torch
import transformers

from distill_nemo.config import StudentConfig, TeacherConfig
from distill_nemo.config_files import load_yaml
from tests.cli.command import STEPS, shrunk, the_recipes
from tests.cli.conftest import SECRET
from tests.training import metrics

pytestmark = pytest.mark.timeout(1800)  # for a busy machine; under two minutes were measured
NUMBER = r"[\d.,]+"
LOSSES = f"lm loss {NUMBER}  kd loss {NUMBER}  logit loss {NUMBER}"
TRAINED = rf"step (\d+)/{STEPS}  {LOSSES}  {NUMBER} tokens/s  ETA \d+:\d\d"
HELD_OUT = rf"step (\d+)/{STEPS}  held out  lm loss {NUMBER}  forward kl {NUMBER}  top1 agreement {NUMBER}"


def check_screen(ended, output, resumed=0):
    """Check that the screen shows a line per step and evaluation, the paths, and nothing else."""
    assert (ended.code, ended.err) == (0, "")
    first, *steps, last = ended.out.splitlines()
    assert re.fullmatch(r"train: started; logs in /\S+/train", first)
    if resumed:
        assert steps.pop(0) == f"resumed from {output}/checkpoints/step_{resumed:08d} at step {resumed} of {STEPS}"
    matches = [re.fullmatch(TRAINED, line) or re.fullmatch(HELD_OUT, line) for line in steps]
    assert all(matches), ended.out
    expected = [*range(1, STEPS + 1), *range(4, STEPS + 1, 4)]
    assert sorted(int(match[1]) for match in matches) == sorted(
        [s for s in expected if s > resumed] + [0] * (not resumed)
    )
    assert last == f"exported step_{STEPS:08d} to {output}/student: the reloaded model gives the same logits"


def check_output(output, initial):
    """Check for metrics of every step, checkpoints, and a trained student that opens in transformers."""
    lines = metrics(output)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    held_out = [line["forward_kl"] for line in lines if line["kind"] == "eval"]
    assert len(held_out) == STEPS // 4 + 1 and held_out[-1] < held_out[0]
    assert (output / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
    student, info = transformers.AutoModelForCausalLM.from_pretrained(output / "student", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = transformers.AutoTokenizer.from_pretrained(output / "student")("def distil(teacher):", return_tensors="pt")
    assert student(**text).logits.isfinite().all()
    before = transformers.AutoModelForCausalLM.from_pretrained(initial).state_dict()
    assert not torch.equal(student.state_dict()["lm_head.weight"], before["lm_head.weight"])


def check_snapshot(output, recipe, overrides):
    """Check that every field of the snapshot is the recipe's, overridden, or read from the models' `config.json`."""
    config, expected = load_yaml(output / "config.yaml"), fdl.build(recipe).keywords
    overridden = {override.partition("=")[0] for override in overrides}
    for section, values in asdict(config).items():
        if section == "output_dir":
            continue
        for field, value in values.items():
            before = getattr(expected[section], field)
            read = section in ("student", "teacher") and before is None
            assert f"{section}.{field}" in overridden or read or value == before, f"{section}.{field}"
    assert type(config.student) is StudentConfig and type(config.teacher) is TeacherConfig
    assert config.student is not config.teacher
    assert (config.student.hidden_size, config.teacher.hidden_size) == (32, 64), "each from its own checkpoint"
    return config


def test_llama_at_tensor_parallel_2(inputs, finished):
    cwd, ended = finished
    output = cwd / "runs" / "llama32_3b_to_1b"
    check_screen(ended, "runs/llama32_3b_to_1b")
    check_output(output, inputs / "student")
    config = check_snapshot(output, the_recipes().llama32_3b_to_1b(), shrunk(inputs))
    assert config.parallelism.tensor_model_parallel_size == 2 and config.parallelism.sequence_parallel


def test_secrets_of_the_environment_are_in_no_file(finished):
    cwd, ended = finished
    files = [path for path in cwd.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in ended.out + ended.err


def test_qwen3_stopped_and_typed_again(others):
    """The second start has the same command, without `run.executor`."""
    qwen3, _, _ = others
    assert qwen3.stopped.code == 143 and 2 <= qwen3.stopped_at < STEPS
    assert qwen3.stopped.err == "stopping: waiting for the checkpoint; the same command resumes\n"
    check_screen(qwen3.ended, "runs/qwen3_8b_to_1p7b", resumed=qwen3.stopped_at)
    output = qwen3.cwd / "runs" / "qwen3_8b_to_1p7b"
    check_output(output, qwen3.cwd / "student")
    config = check_snapshot(output, the_recipes().qwen3_8b_to_1p7b(), qwen3.overrides)
    assert config.student.family == config.teacher.family == "qwen3"


def test_a_recipe_composed_in_python(finished, others):
    """The script (in conftest.py) gives the same run as the command, except for the temperature."""
    _, _, scripted = others
    output = scripted.cwd / "runs" / "llama32_3b_to_1b"
    assert (scripted.ended.code, scripted.ended.err) == (0, "")
    assert load_yaml(output / "config.yaml").distillation.temperature == 2.0
    lines, commands = metrics(output), metrics(finished[0] / "runs" / "llama32_3b_to_1b")
    assert len(lines) == len(commands)
    assert lines[0] == commands[0], "the same initial student on the same held-out tokens"
    assert lines[1]["lm_loss"] == commands[1]["lm_loss"] and lines[1]["kd_loss"] != commands[1]["kd_loss"]


def test_the_snapshot_repeats_the_run_under_plain_torchrun_bit_for_bit(others):
    _, _, scripted = others
    output = scripted.cwd / "runs" / "llama32_3b_to_1b"
    assert scripted.again.code == 0
    assert metrics(scripted.cwd / "again") == metrics(output)
    config, again = (load_yaml(where / "config.yaml") for where in (output, scripted.cwd / "again"))
    assert replace(again, output_dir=config.output_dir) == config

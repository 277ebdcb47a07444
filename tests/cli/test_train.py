"""The recipes for full-size models, shrunk onto tiny ones: what a run prints and leaves, and other ways to start it.

The rest of each recipe is as it is: parallel layout, optimizer, losses.
"""

import re
import sys
from dataclasses import asdict, replace

import fiddle as fdl
import pytest
import torch
import transformers

from distill_nemo.config import StudentConfig, TeacherConfig, load_yaml, save_yaml
from tests.cli.command import BIN, STEPS, TWO_RANKS, Command, nemo, shrunk, the_recipes
from tests.tiny_models import write_hf
from tests.training import metrics

pytestmark = pytest.mark.timeout(1800)  # for a machine that does much else; seen: under two minutes
NUMBER = r"[\d.,]+"
TRAINED = (
    rf"step (\d+)/{STEPS}  lm loss {NUMBER}  kd loss {NUMBER}  logit loss {NUMBER}  {NUMBER} tokens/s  ETA \d+:\d\d"
)
HELD_OUT = rf"step (\d+)/{STEPS}  held out  lm loss {NUMBER}  forward kl {NUMBER}  top1 agreement {NUMBER}"


def check_screen(ended, output):
    """A line a step, and where things are; nothing else."""
    assert (ended.code, ended.err) == (0, "")
    first, *steps, last = ended.out.splitlines()
    assert re.fullmatch(r"train: started; logs in /\S+/train", first)
    matches = [re.fullmatch(TRAINED, line) or re.fullmatch(HELD_OUT, line) for line in steps]
    assert all(matches), ended.out
    assert sorted(int(match[1]) for match in matches) == sorted([*range(0, STEPS + 1, 4), *range(1, STEPS + 1)])
    assert last == f"exported step_{STEPS:08d} to {output}/student: the reloaded model gives the same logits"


def check_output(output, initial):
    """Figures of every step, checkpoints, and a trained student that opens in transformers."""
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
    """Every field of the snapshot is the recipe's, or what was overridden, or read from the models' `config.json`."""
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


def test_qwen3_at_tensor_parallel_2_instead_of_4(inputs, tmp_path):
    teacher = write_hf(tmp_path / "teacher", "qwen3")
    student = write_hf(tmp_path / "student", "qwen3", seed=2, layers=2, width=32)
    overrides = shrunk(inputs, teacher__checkpoint=teacher, student__checkpoint=student)
    overrides.append("parallelism.tensor_model_parallel_size=2")
    ended = nemo("train", "--factory", "qwen3_8b_to_1p7b", *overrides, *TWO_RANKS, cwd=tmp_path)
    check_screen(ended, "runs/qwen3_8b_to_1p7b")
    output = tmp_path / "runs" / "qwen3_8b_to_1p7b"
    check_output(output, student)
    config = check_snapshot(output, the_recipes().qwen3_8b_to_1p7b(), overrides)
    assert config.parallelism.sequence_parallel and config.student.family == "qwen3"


SCRIPT = """\
import sys

import nemo_run as run

from distill_nemo.executors import local
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    inputs = sys.argv[1]
    recipe = llama32_3b_to_1b(teacher=f"{inputs}/teacher", student=f"{inputs}/student")
    recipe.distillation.temperature = 2.0
    recipe.data.train, recipe.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    recipe.data.tokenizer, recipe.data.sequence_length = f"{inputs}/tokenizer", 32
    recipe.optimizer.warmup_steps = 2
    recipe.training.steps, recipe.training.global_batch_size = int(sys.argv[2]), 4
    recipe.training.eval_interval, recipe.training.eval_batches = 4, 1
    recipe.checkpoint.export = False
    run.run(recipe, executor=local(processes=2))
"""


@pytest.fixture(scope="module")
def scripted(inputs, tmp_path_factory):
    """The same recipe composed in Python, at temperature 2: its output directory, and what it printed."""
    cwd = tmp_path_factory.mktemp("script")
    (cwd / "script.py").write_text(SCRIPT)
    return cwd / "runs" / "llama32_3b_to_1b", Command([sys.executable, "script.py", inputs, STEPS], cwd).ended()


def test_a_recipe_composed_in_python(finished, scripted):
    output, ended = scripted
    assert (ended.code, ended.err) == (0, "")
    assert load_yaml(output / "config.yaml").distillation.temperature == 2.0
    lines, others = metrics(output), metrics(finished[0] / "runs" / "llama32_3b_to_1b")
    assert len(lines) == len(others)
    assert lines[0] == others[0], "the same initial student on the same held-out tokens"
    assert lines[1]["lm_loss"] == others[1]["lm_loss"] and lines[1]["kd_loss"] != others[1]["kd_loss"]


def test_the_snapshot_repeats_the_run_under_plain_torchrun_bit_for_bit(scripted, tmp_path):
    output, _ = scripted
    config = load_yaml(output / "config.yaml")
    save_yaml(replace(config, output_dir=str(tmp_path / "again")), tmp_path / "config.yaml")
    words = [BIN / "torchrun", "--nproc-per-node", 2, "-m", "distill_nemo", "config.yaml"]
    assert Command(words, tmp_path).ended().code == 0
    assert metrics(tmp_path / "again") == metrics(output)
    again = load_yaml(tmp_path / "again" / "config.yaml")
    assert replace(again, output_dir=config.output_dir) == config

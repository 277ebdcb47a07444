"""Runs that several test files share."""

import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from distill_nemo.config_files import load_yaml, save_yaml
from tests.cli.command import BIN, STEPS, TWO_RANKS, Command, Ended, last_step, nemo, shrunk, start, together
from tests.tiny_models import write_hf

SECRET = "hf_in-the-environment"
ONE_RANK = ("parallelism.tensor_model_parallel_size=1", "parallelism.sequence_parallel=false")


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """Return a finished run of `llama32_3b_to_1b` on two ranks: its directory, and its output."""
    cwd = tmp_path_factory.mktemp("finished")
    arguments = ("train", "--factory", "llama32_3b_to_1b", "--yes", *shrunk(inputs), *TWO_RANKS)
    return cwd, nemo(*arguments, cwd=cwd, HF_TOKEN=SECRET)


@dataclass
class Qwen3:
    """A run of `qwen3_8b_to_1p7b` on one rank: stopped by SIGTERM, then started again with the same command."""

    cwd: Path
    overrides: list[str]
    stopped: Ended
    stopped_at: int
    ended: Ended


@dataclass
class Scripted:
    """A recipe composed in Python, launched on two ranks; then its snapshot under plain torchrun."""

    cwd: Path
    ended: Ended
    again: Ended


@pytest.fixture(scope="session")
def others(inputs, tmp_path_factory):
    """Return `Qwen3`, a run without finite loss (directory, Ended), `Scripted`. Two at a time, as they mostly wait."""
    one, two, three = (tmp_path_factory.mktemp(name) for name in ("qwen3", "not_finite", "scripted"))
    first, rest = together(lambda: _qwen3(inputs, one), lambda: (_not_finite(inputs, two), _scripted(inputs, three)))
    return first, *rest


def _qwen3(inputs, cwd):
    teacher = write_hf(cwd / "teacher", "qwen3")
    student = write_hf(cwd / "student", "qwen3", seed=2, layers=2, width=32)
    overrides = [*shrunk(inputs, teacher__checkpoint=teacher, student__checkpoint=student), *ONE_RANK]
    arguments, output = ("train", "--factory", "qwen3_8b_to_1p7b", *overrides), cwd / "runs" / "qwen3_8b_to_1p7b"
    command = start(*arguments, cwd=cwd).at_step(output, 2)
    command.signal(signal.SIGTERM)
    stopped = command.ended()
    return Qwen3(cwd, overrides, stopped, last_step(output), nemo(*arguments, cwd=cwd))


def _not_finite(inputs, cwd):
    overrides = shrunk(inputs, optimizer__lr=1e30, optimizer__min_lr=0, optimizer__warmup_steps=0)
    return cwd, nemo("train", "--factory", "llama32_3b_to_1b", *overrides, *ONE_RANK, cwd=cwd)


def _scripted(inputs, cwd):
    (cwd / "script.py").write_text(SCRIPT)
    ended = Command([sys.executable, "script.py", inputs, STEPS], cwd).ended()
    config = load_yaml(cwd / "runs" / "llama32_3b_to_1b" / "config.yaml")
    save_yaml(replace(config, output_dir="again"), cwd / "config.yaml")
    torchrun = [BIN / "torchrun", "--nproc-per-node", 2, "-m", "distill_nemo", "config.yaml"]
    return Scripted(cwd, ended, Command(torchrun, cwd).ended())


SCRIPT = """\
import sys

import nemo_run as run

from distill_nemo.executors import local
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    inputs, steps = sys.argv[1], int(sys.argv[2])
    recipe = llama32_3b_to_1b(teacher=f"{inputs}/teacher", student=f"{inputs}/student")
    recipe.distillation.temperature = 2.0
    recipe.data.train, recipe.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    recipe.data.tokenizer, recipe.data.sequence_length = f"{inputs}/tokenizer", 32
    recipe.optimizer.warmup_steps = 2
    recipe.training.steps, recipe.training.global_batch_size = steps, 2
    recipe.training.micro_batch_size = 1
    recipe.parallelism.tensor_model_parallel_size, recipe.parallelism.sequence_parallel = 2, True
    recipe.training.eval_interval, recipe.training.eval_batches = 4, 1
    recipe.checkpoint.export = False
    run.run(recipe, executor=local(processes=2))
"""

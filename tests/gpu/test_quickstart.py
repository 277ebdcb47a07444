"""The quickstart's pair in bf16 on one device, without NeMo-Run: killed, resumed, exported, evaluated.

Sizes, text and learning rates are those of recipes/quickstart.py, whose configs need NeMo-Run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill_nemo.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.config_files import save_yaml
from tests.gpu.conftest import REHEARSAL

ROOT = Path(__file__).parents[2]
STEPS, TEACHER_STEPS = (8, 4) if REHEARSAL else (160, 240)
PATIENCE = 400.0


def config(root: Path, name: str, layers: int, width: int, steps: int, lr: float) -> RunConfig:
    model = {"family": "llama", "num_layers": layers, "hidden_size": width, "ffn_hidden_size": 3 * width}
    heads = {"num_attention_heads": width // 32, "num_query_groups": width // 64, "vocab_size": 2048}
    run = RunConfig(str(root / name), StudentConfig(**model, **heads, max_position_embeddings=512))
    run.data = DataConfig([str(root / "data/train")], [str(root / "data/valid")], sequence_length=128)
    run.data.tokenizer = str(root / "data/tokenizer")
    run.training = TrainingConfig(steps=steps, micro_batch_size=8, global_batch_size=16, data_seed=1)
    run.training.eval_interval, run.training.eval_batches = steps // 2, 2
    run.optimizer = OptimizerConfig(lr=lr, min_lr=lr / 10, warmup_steps=min(20, steps // 2))
    run.checkpoint = CheckpointConfig(save_interval=2 if REHEARSAL else 40)
    run.logging = LoggingConfig(log_interval=1, tensorboard=False)
    return run


def start(run: RunConfig) -> subprocess.Popen[str]:
    """Start `python -m distill_nemo CONFIG.yaml` in a process of its own."""
    path = Path(run.output_dir).with_suffix(".yaml")
    save_yaml(run, path)
    command = [sys.executable, "-m", "distill_nemo", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out[-4000:]
    return out


def lines(run: RunConfig) -> list[dict]:
    path = Path(run.output_dir) / "metrics.jsonl"
    complete = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in complete if line.endswith("\n")]


def trained(run: RunConfig) -> dict[int, dict]:
    return {line["step"]: line for line in lines(run) if line["kind"] == "train"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from distill_nemo.data.stdlib_corpus import write_stdlib_corpus

    directory = tmp_path_factory.mktemp("quickstart")
    write_stdlib_corpus(str(directory / "data"))
    return directory


@pytest.fixture(scope="module")
def distilled(root):
    """Return the distilled student's run, killed once on its way, and the output of its second start."""
    teacher = config(root, "teacher", 4, 256, TEACHER_STEPS, 1e-3)
    finish(start(teacher))
    run = config(root, "distilled", 2, 128, STEPS, 2e-3)
    run.teacher = TeacherConfig(checkpoint=str(root / "teacher" / "student"))
    process, deadline = start(run), time.monotonic() + PATIENCE
    while max(trained(run), default=0) <= run.checkpoint.save_interval + 1:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return run, finish(start(run))


def test_the_killed_run_resumes_from_its_checkpoint(distilled):
    run, printed = distilled
    assert "resumed from" in printed
    assert list(trained(run)) == list(range(1, STEPS + 1))
    losses = [line["logit_loss"] for line in trained(run).values()]
    assert losses[-1] < losses[0]


def test_the_student_opens_in_transformers(distilled, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(distilled[0].output_dir) / "student"
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert model.dtype == (torch.float32 if REHEARSAL else torch.bfloat16)
    ids = tokenizer("def add(a, b):\n    return a", return_tensors="pt")
    logits = model.to(device)(ids["input_ids"].to(device)).logits
    assert logits.isfinite().all() and logits.shape[-1] == 2048


def test_held_out_text_is_evaluated(distilled):
    last = [line for line in lines(distilled[0]) if line["kind"] == "eval"][-1]
    assert 0 < last["forward_kl"] < 3 and 0 < last["lm_loss"] < (8 if REHEARSAL else 5)

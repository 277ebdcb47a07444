"""Runs of two GPUs, by NCCL, compute what one GPU does: weights, checkpoints and exports pass every collective."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_nemo.config_files import save_yaml
from tests.gpu.conftest import REHEARSAL
from tests.spawn import reserved_port
from tests.tiny_models import write_hf
from tests.training import changed, differences, metrics, tiny_run

LAYOUTS = {
    "data": {},
    "tensor": {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
    "pipeline": {"parallelism.pipeline_model_parallel_size": 2},
    "context": {"parallelism.context_parallel_size": 2},
    "experts": {"parallelism.expert_model_parallel_size": 2},
}


def train(inputs, output, ranks, changes):
    """Train under torchrun, save in the background, export, and return the metrics."""
    config = output.with_suffix(".yaml")
    saved = {"checkpoint.async_save": True, "checkpoint.export": True}
    save_yaml(changed(tiny_run(inputs, output), changes | saved), config)
    with reserved_port() as port:
        where = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "distill_nemo", str(config)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return metrics(output)


@pytest.mark.parametrize("dtype", ["float32"] if REHEARSAL else ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["tensor"] if REHEARSAL else LAYOUTS)
def test_two_gpus_compute_what_one_does(inputs, tmp_path, layout, dtype):
    if not REHEARSAL and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    changes = {"training.dtype": dtype}
    if layout == "experts":
        for seed, role in enumerate(("student", "teacher")):
            changes[f"{role}.checkpoint"] = write_hf(tmp_path / role, "qwen3_moe", seed=seed + 3, layers=2)
    one, two = (train(inputs, tmp_path / f"{n}", n, changes | (LAYOUTS[layout] if n == 2 else {})) for n in (1, 2))
    worst = differences(two, one)
    assert worst["lm_loss"] < (2e-3 if dtype == "float32" else 0.03), worst

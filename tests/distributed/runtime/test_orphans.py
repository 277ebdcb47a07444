"""Ranks of a killed torchrun save and end, instead of training on unseen."""

import subprocess
import sys
import time

from distill_nemo.config_files import save_yaml
from tests.training import metrics, tiny_run


def test_ranks_end_with_their_torchrun(inputs, tmp_path):
    run = tiny_run(inputs, tmp_path / "run", steps=100_000, eval_interval=100_000)
    run.checkpoint.save_interval = 100_000
    run.parallelism.tensor_model_parallel_size = 2
    save_yaml(run, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "distill_nemo", str(tmp_path / "config.yaml")]
    lines = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "output").open("w") as output:
        torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
        try:
            while torchrun.poll() is None and not (lines.is_file() and lines.read_bytes().count(b"\n") > 3):
                time.sleep(0.1)
        finally:
            torchrun.kill()
        out, _ = torchrun.communicate(timeout=180)  # to the end of the pipe, which the ranks hold
    assert "stopped by signal 15; checkpoint written" in out, (out, (tmp_path / "output").read_text())
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{step:08d}"
    assert not (tmp_path / "run" / "run.lock").exists()

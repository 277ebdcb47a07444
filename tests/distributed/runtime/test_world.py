"""A world of several processes is joined once, and divided as often as needed."""

import subprocess
import sys

SCRIPT = """
from distill_nemo.config import ParallelismConfig
from distill_nemo.runtime.process_groups import of_all_ranks, process_groups, rank, world

with world(timeout_minutes=1):
    for size in (1, 2):
        with process_groups(ParallelismConfig(tensor_model_parallel_size=size)):
            assert of_all_ranks(rank()) == [0, 1]
"""


def test_ranks_of_a_launcher_divide_their_world_twice(tmp_path):
    """Ranks that leave it and join again wait for each other at addresses of the first time."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "loopback", "--nproc-per-node", "2"]
    command = [*torchrun, "--rdzv-endpoint", "localhost:0", str(tmp_path / "script.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr

"""A disk that fills up during a save: the last good checkpoint stays, and nothing half-written does."""

import contextlib
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.training import metrics, tiny_run


def run(inputs, output, steps, asynchronous=False, file_limit=None):
    """Train to `steps` and save every second one. On the last rank no file may grow beyond `file_limit` bytes."""
    from distill_nemo.training.entry import run_config

    config = tiny_run(inputs, output, steps=steps, eval_interval=100)
    config.parallelism.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    config.optimizer.decay_steps = 8
    config.checkpoint.save_interval, config.checkpoint.async_save = 2, asynchronous
    limited = file_limit if os.environ["RANK"] == str(config.parallelism.tensor_model_parallel_size - 1) else None
    with file_size_limit(limited):
        run_config(config)


@contextlib.contextmanager
def file_size_limit(limit):
    """Let the kernel refuse further writes: EFBIG takes the place of a full disk's ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoints(output):
    return sorted(path.name for path in Path(output, "checkpoints").iterdir())


def assert_kept(error, output):
    """Check that the error has advice, and that only the last good checkpoint is left, named and whole."""
    assert isinstance(error, OSError) and len(str(error).splitlines()) <= 10
    for message in ("step_00000004", "could not be written", "The last good one", "step_00000002", "free space"):
        assert message in str(error)
    assert checkpoints(output) == ["latest", "step_00000002"]
    assert Path(output, "checkpoints", "latest").read_text() == "step_00000002"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_stops_all(inputs, two, tmp_path, asynchronous):
    two.run(run, inputs, tmp_path / "out", 2)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    with pytest.raises(OSError) as raised:
        two.run(run, inputs, tmp_path / "out", 8, asynchronous, largest // 2)
    assert_kept(raised.value, tmp_path / "out")
    two.close()  # like a command typed again: see `test_a_full_disk`
    two.run(run, inputs, tmp_path / "out", 8, asynchronous)
    assert metrics(tmp_path / "out")[-1]["step"] == 8


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount; the test above does without")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_run_survives_a_full_disk(inputs, two, small_disk):
    """The last run has new processes, like a command typed again.

    In the old ones, a failed write has left a memoryview of a BytesIO in a cycle, through the frames of torch's
    traceback. Python 3.12.1's garbage collector crashes on those.
    """
    output = small_disk / "out"
    two.run(run, inputs, output, 2)
    size = sum(path.stat().st_size for path in (output / "checkpoints").rglob("*.distcp"))
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - size // 2))
    with pytest.raises(OSError) as raised:
        two.run(run, inputs, output, 8)
    assert_kept(raised.value, output)
    assert "(0.00 GiB free)" in str(raised.value)
    (small_disk / "filler").unlink()
    two.close()
    two.run(run, inputs, output, 8)
    assert metrics(output)[-1]["step"] == 8

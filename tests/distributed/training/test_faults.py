"""Real faults in real runs of two processes: a resumed run equals an uninterrupted one bit for bit.

A full disk: tests/distributed/checkpoint/test_no_space.py. SIGTERM: tests/distributed/checkpoint/test_resume.py.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from distill_nemo.config import ExportConfig, StudentConfig
from tests.spawn import ProcessEndedError
from tests.training import changed, metrics, tiny_run

SAVED = "step_00000006"


def train(inputs, output, changes=None, fault=None):
    """Run once on this rank, with `fault(output, rank)` beside it. Return the output on stdout and stderr."""
    from distill_nemo.training.entry import run_config

    run = changed(
        tiny_run(inputs, output), {"checkpoint.save_interval": 2, "optimizer.decay_steps": 8, **(changes or {})}
    )
    run.parallelism.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    if fault is not None:
        threading.Thread(target=fault, args=(Path(output), int(os.environ["RANK"])), daemon=True).start()
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        run_config(run)
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(inputs, two, tmp_path_factory):
    """Return the metrics of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    two.run(train, inputs, output)
    return metrics(output)


def waiting(condition):
    while not condition():
        time.sleep(0.0005)


def killed_in_a_step(output, rank):
    lines = output / "metrics.jsonl"
    waiting(lambda: lines.is_file() and lines.read_bytes().count(b"\n") >= 5)  # start, evaluation, three steps
    os.kill(os.getpid(), signal.SIGKILL if rank == 0 else 0)


def killed_in_a_save(output, rank):
    waiting((output / "checkpoints" / "step_00000004.partial").is_dir)
    os.kill(os.getpid(), signal.SIGKILL if rank == 1 else 0)


@pytest.mark.parametrize(
    ("fault", "asynchronous"), [(killed_in_a_step, False), (killed_in_a_save, False), (killed_in_a_save, True)]
)
def test_a_run_survives_kill_9(inputs, two, whole, tmp_path, fault, asynchronous):
    changes = {"checkpoint.async_save": asynchronous, "logging.tensorboard": True}
    with pytest.raises((ProcessEndedError, RuntimeError, OSError)):  # a rank's error about the other's death, or none
        two.run(train, inputs, tmp_path, changes, fault)
    assert metrics(tmp_path)[-1]["step"] < 8, "the kill came too late to show anything"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"
    printed = two.run(train, inputs, tmp_path, changes)[0]
    assert "step_00000002 at step 2 of 8" in printed
    assert ("ended without freeing" in printed) == (fault is killed_in_a_step), "rank 0 holds the lock"
    assert metrics(tmp_path) == whole
    assert in_tensorboard(tmp_path) == [(line["step"], line["lm_loss"]) for line in whole if line["kind"] == "train"]
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "run.lock").exists()


def in_tensorboard(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/lm_loss")]


def cut_short(output, rank):
    lines = output / "metrics.jsonl"
    waiting(lambda: lines.is_file() and lines.read_bytes().count(b"\n") >= 5)
    if rank == 0:
        os.truncate(output / "train.bin", 100)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_data_file_that_shrinks(inputs, two, tmp_path, workers):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{inputs}/train{suffix}", tmp_path)
    changes = {"data.train": [f"{tmp_path}/train"], "data.num_workers": workers, "training.steps": 20}
    changes["training.eval_interval"] = 100
    with pytest.raises(ValueError, match=r"train\.bin has 100 bytes now, and had \d{5,} when this run began"):
        two.run(train, inputs, tmp_path, changes, cut_short)
    last = metrics(tmp_path)[-1]["step"]
    assert last < 20
    shutil.copy(f"{inputs}/train.bin", tmp_path)
    printed = two.run(train, inputs, tmp_path, changes)[0]
    assert "resumed from" in printed and f"at step {last // 2 * 2} of 20" in printed
    resumed, once = metrics(tmp_path), tmp_path / "once"
    two.run(train, inputs, once, changes)
    assert metrics(once) == resumed


def warned_while_loading(output, rank):
    waiting((output / "run.lock").exists)
    os.kill(os.getpid(), signal.SIGURG)


def code_of_train(*args):
    try:
        train(*args)
    except SystemExit as stopped:
        return stopped.code


def test_a_warning_that_comes_before_the_first_step(inputs, two, whole, tmp_path):
    assert two.run(code_of_train, inputs, tmp_path, None, warned_while_loading) == [128 + signal.SIGURG] * 2
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001"
    two.run(train, inputs, tmp_path)
    assert metrics(tmp_path) == whole


def slow_disk_and_transformers(output, rank):
    """Let each take longer, once, than the collectives' timeout of six seconds."""
    from distill_nemo.models.checkpoints import huggingface, write_safetensors

    def slow_once(module, name):
        function = getattr(module, name)

        def slowly(*args):
            setattr(module, name, function)
            time.sleep(7)
            return function(*args)

        setattr(module, name, slowly)

    if rank == 0:
        slow_once(write_safetensors, "_write")
        slow_once(huggingface, "open_with_transformers")


def test_an_export_may_take_longer_than_a_collective(inputs, two, tmp_path):
    began = time.monotonic()
    changes = {"checkpoint.export": True, "parallelism.timeout_minutes": 0.1}
    two.run(train, inputs, tmp_path, changes, slow_disk_and_transformers)
    assert time.monotonic() - began > 14, "too fast to show anything"
    assert (tmp_path / "student" / "model.safetensors").is_file()


def a_file_where_the_export_belongs(output, rank):
    """Put it there during training, since a target that cannot be written is refused before."""
    waiting((output / "metrics.jsonl").is_file)
    if rank == 0:
        (output / "student").write_text("")


def test_an_export_that_failed_before_is_not_taken_for_the_next(inputs, two, tmp_path):
    """When torchrun restarts the ranks, it keeps the store that tells the other ranks the result."""
    exporting = {"checkpoint.export": True}
    with pytest.raises(RuntimeError, match="export failed; the checkpoint is whole"):
        two.run(train, inputs, tmp_path, exporting, a_file_where_the_export_belongs)
    (tmp_path / "student").unlink()
    two.run(train, inputs, tmp_path, exporting)
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_kill_9_before_anything_was_saved(inputs, two, whole, tmp_path):
    with pytest.raises((ProcessEndedError, RuntimeError, OSError)):
        two.run(train, inputs, tmp_path, {"checkpoint.save_interval": 8}, killed_in_a_step)
    two.run(train, inputs, tmp_path, {"checkpoint.save_interval": 8})
    assert metrics(tmp_path) == whole


@pytest.fixture(scope="module")
def at_six(inputs, two, tmp_path_factory):
    """Return a run of 8 steps that has saved steps 4 and 6."""
    output = tmp_path_factory.mktemp("at_six")
    two.run(train, inputs, output, {"training.steps": 6})
    return output


def flipped(directory):
    with (directory / "__1_0.distcp").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncated(directory):
    os.truncate(directory / "__0_0.distcp", 1000)


def missing(directory):
    (directory / ".metadata").unlink()


DAMAGES = {
    flipped: "__1_0.distcp is not what was written",
    truncated: "__0_0.distcp is not what was written",
    missing: ".metadata is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(inputs, two, whole, at_six, tmp_path, damage):
    output = shutil.copytree(at_six, tmp_path / "run")
    damage(output / "checkpoints" / SAVED)
    printed = two.run(train, inputs, output)[0]
    assert f"{SAVED} is damaged: {DAMAGES[damage]}" in printed and "step_00000004 at step 4 of 8" in printed
    assert metrics(output) == whole


def test_damaged_weights_are_neither_exported_nor_taught_nor_measured(inputs, one, at_six, tmp_path):
    run = shutil.copytree(at_six, tmp_path / "run")
    flipped(run / "checkpoints" / SAVED)
    for use in (exported, taught, evaluated):
        with pytest.raises(ValueError, match=r"is damaged: __1_0\.distcp is not what was written"):
            one.run(use, inputs, run, tmp_path)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "out" / "checkpoints").exists()


def exported(inputs, run, root):
    from distill_nemo.checkpoint.export import export

    export(ExportConfig(str(run), str(root / "hf")))


def taught(inputs, run, root):
    train(inputs, root / "out", {"teacher.checkpoint": str(run)})


def evaluated(inputs, run, root):
    from distill_nemo.training.evaluate import evaluate_student

    evaluate_student(StudentConfig(str(run)), str(inputs / "valid"), None, 32, 8)


def test_the_sums_are_those_of_sha256sum(at_six):
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=at_six / "checkpoints" / SAVED, capture_output=True
    )
    assert checked.returncode == 0, checked
    listed = {line[66:] for line in (at_six / "checkpoints" / SAVED / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in (at_six / "checkpoints" / SAVED).iterdir()} - {"SHA256SUMS"}


def test_a_kill_between_the_data_and_the_tracker(inputs, two, whole, at_six, tmp_path):
    output = shutil.copytree(at_six, tmp_path / "run")
    (output / "checkpoints" / "latest").write_text("step_00000004")
    assert "step_00000004 at step 4 of 8" in two.run(train, inputs, output)[0]
    assert metrics(output) == whole


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_table_of_contents_that_would_run_code(inputs, two, at_six, tmp_path):
    checkpoint = shutil.copytree(at_six / "checkpoints" / SAVED, tmp_path / "teacher")
    contents, sums = checkpoint / ".metadata", checkpoint / "SHA256SUMS"
    before = hashlib.sha256(contents.read_bytes()).hexdigest()
    contents.write_bytes(pickle.dumps(Runs()))
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(contents.read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match=r"\.metadata is not loaded: it names posix\.system"):
        two.run(train_there, tmp_path, inputs, checkpoint)
    assert not (tmp_path / "executed").exists()


def train_there(where, inputs, teacher):
    os.chdir(where)
    train(inputs, where / "out", {"teacher.checkpoint": str(teacher)})


def not_finite(inputs, output, steps, on_nan):
    """Let the losses of rank 1's micro batch be NaN in these steps."""
    from distill_nemo.training import loop
    from distill_nemo.training.entry import run_config

    forward_step, calls, printed = loop.forward_step, itertools.count(1), io.StringIO()

    def faulty(*args):
        losses, loss_func = forward_step(*args)
        return losses * math.nan if next(calls) in steps and os.environ["RANK"] == "1" else losses, loss_func

    changes = {"training.on_nan": on_nan, "training.steps": 14, "distillation.lm_weight": 0.5}
    loop.forward_step = faulty
    try:
        with contextlib.redirect_stderr(printed):
            run_config(changed(tiny_run(inputs, output), changes))
    finally:
        loop.forward_step = forward_step
    return printed.getvalue()


def test_a_step_that_is_not_finite_is_left_out(inputs, two, tmp_path):
    printed = two.run(not_finite, inputs, tmp_path, [3], "skip")[0]
    assert printed.startswith("warning: step 3: ") and printed.count("\n") == 1
    assert "gradient norm not finite, losses of rank 1 (samples 8 to 11): the update is skipped" in printed
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("kd_loss", 0) is None] == [3]
    assert lines[-1]["step"] == 14 and lines[-1]["lm_loss"] is not None


@pytest.mark.parametrize(("steps", "on_nan", "last"), [([4], "stop", 4), (range(3, 14), "skip", 12)])
def test_a_step_that_is_not_finite_stops_the_run(inputs, two, tmp_path, steps, on_nan, last):
    with pytest.raises(Exception, match=f"step {last}: .*gradient norm not finite, losses of rank 1") as stopped:
        two.run(not_finite, inputs, tmp_path, steps, on_nan)
    assert type(stopped.value).__name__ == "NotFiniteError"
    assert ("the 10th step in a row" in str(stopped.value)) == (on_nan == "skip")


def not_finite_without_help(*args):
    from distill_nemo.training import setup

    helped, setup._skip_not_finite = setup._skip_not_finite, lambda optimizer: None
    try:
        return not_finite(*args)
    finally:
        setup._skip_not_finite = helped


def test_megatron_still_updates_by_a_gradient_that_is_not_finite(inputs, two, tmp_path):
    with pytest.raises(Exception, match="the 10th step in a row"):  # after one NaN, every weight is NaN
        two.run(not_finite_without_help, inputs, tmp_path, [3], "skip")


def test_two_runs_in_one_directory(inputs, one, two, whole, tmp_path):
    refused = []

    def second():
        waiting(lambda: (tmp_path / "metrics.jsonl").is_file())
        try:
            one.run(train, inputs, tmp_path)
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    two.run(train, inputs, tmp_path, {"training.steps": 30, "optimizer.decay_steps": 30})
    thread.join()
    assert len(refused) == 1 and f"output_dir = {tmp_path}: another process writes there (process " in refused[0]
    assert not (tmp_path / "run.lock").exists()


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep():
    time.sleep(1000)


def hanging(inputs, output, fault):
    """Let rank 1 hang in its third micro batch."""
    from distill_nemo.training import loop
    from distill_nemo.training.entry import run_config

    os.dup2(os.open(f"{output}/stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    forward_step, calls = loop.forward_step, itertools.count(1)

    def faulty(*args):
        if next(calls) == 3 and os.environ["RANK"] == "1":
            fault()
        return forward_step(*args)

    loop.forward_step = faulty
    run_config(changed(tiny_run(inputs, output), {"parallelism.timeout_minutes": 0.1}))


@pytest.mark.parametrize(
    ("fault", "printed"), [(stopped, "gives no sign of life"), (asleep, "is in: step 3, asleep (")]
)
def test_a_rank_that_hangs_is_named(inputs, two, tmp_path, fault, printed):
    with pytest.raises(ProcessEndedError):
        two.run(hanging, inputs, tmp_path, fault)
    lines = (tmp_path / "stderr").read_text().splitlines()
    error = next(line for line in lines if line.startswith("error: no progress for 5 s"))
    collective = r"rank 0 is in: forward and backward passes, \w+ \(distributed_c10d\.py:\d+\) from start_grad_sync "
    assert f"rank 1 {printed}" in error and re.search(collective, error), error

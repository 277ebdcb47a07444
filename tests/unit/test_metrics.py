"""Where figures go: JSONL, TensorBoard, and the line on the screen."""

import os
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

from distill_nemo.config import LoggingConfig
from distill_nemo.reports import metrics_file
from distill_nemo.training.metrics import MetricsLog


def line(step, **values):
    return {"step": step, "lm_loss": 5.0 - step, "tokens": step * 64, "tokens_per_second": 100.0, **values}


def write(directory, resumed, steps, **config):
    log = MetricsLog(directory, LoggingConfig(**config), 10, resumed, enabled=True)
    for step in steps:
        log.train(line(step), show=True)
    log.evaluation({"step": steps[-1], "lm_loss": 2.5, "tokens": 0})
    log.close()


def test_tensorboard_and_jsonl_agree_and_a_resume_writes_nothing_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3, 4])  # step 3 was not in the checkpoint: it comes anew
    lines = metrics_file.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/lm_loss")]
    assert scalars == [(x["step"], x["lm_loss"]) for x in lines if x["kind"] == "train"]
    assert [(e.step, e.value) for e in events.Scalars("eval/lm_loss")][-1] == (4, 2.5)


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2], tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    write(tmp_path, 2, [3], tensorboard=False)
    steps = [x["step"] for x in metrics_file.read(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    assert steps == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(), 10, 0, enabled=False)
    log.train(line(1), show=True)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_in_the_same_run_until_the_directory_is_another(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: begun.append(given)))

    def attempt(directory, resumed):
        directory.mkdir(exist_ok=True)
        MetricsLog(directory, LoggingConfig(tensorboard=False, wandb_project="kd"), 10, resumed, enabled=True)
        assert begun[-1]["resume"] == "allow" and re.fullmatch("[0-9a-f]{16}", begun[-1]["id"])
        return begun[-1]["id"]

    first = attempt(tmp_path / "a", 0)
    assert attempt(tmp_path / "a", 4) == first
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = attempt(tmp_path / "b", 4)
    shutil.rmtree(tmp_path / "a")
    assert len({first, copied, attempt(tmp_path / "a", 0)}) == 3


SCRIPT = """
import pathlib, sys
from tests.unit.test_metrics import write
write(pathlib.Path(sys.argv[1]), 0, [1, 2, 3], tensorboard=False)
"""


def test_progress_bar_on_a_terminal_and_plain_lines_elsewhere(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step 3/10  lm loss 2.0000  100 tokens/s  ETA 0:00" in plain
    assert "\x1b" not in plain
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert b"\x1b[" in shown and "3/10" in shown.decode() and "step 1/10" not in shown.decode()

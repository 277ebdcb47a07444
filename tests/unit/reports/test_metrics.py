"""Destinations of metrics: JSONL, TensorBoard, and the line on the screen."""

import os
import pty
import subprocess
import sys

import pytest

from distill_nemo.config import LoggingConfig
from distill_nemo.reports.page import Page, write_page
from distill_nemo.reports.runs import read_run
from distill_nemo.runtime import metrics_file
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
    write(tmp_path, 2, [3, 4])  # step 3 was not in the checkpoint, so it is run again
    lines = metrics_file.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/lm_loss")]
    assert scalars == [(x["step"], x["lm_loss"]) for x in lines if x["kind"] == "train"]
    assert [(e.step, e.value) for e in events.Scalars("eval/lm_loss")][-1] == (4, 2.5)


BROKEN = {
    "cut short by a kill": b'{"kind": "train", "st',
    "empty": b"",
    "zeros after a power loss": bytes(60),
    "no text": b"\xff\xfe{}",
    "no text inside": b'{"kind": "train", "step": 2, "note": "\xff"}',
    "UTF-16": '{"kind": "train", "step": 2'.encode("utf-16"),
    "two in one": b'{"kind": "train", "st{"kind": "train", "step": 2}',
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
}
FOREIGN = {
    "no step": b'{"note": "the learning rate was too high"}',
    "a step of text": b'{"kind": "train", "step": "2", "lm_loss": 1.0}',
    "a step with a fraction": b'{"kind": "train", "step": 2.5}',
    "no step yet": b'{"kind": "eval", "step": null}',
    "a step that is true": b'{"kind": "train", "step": true}',
    "a step that is a list": b'{"kind": "train", "step": [2]}',
}
ODD = {
    "no kind": b'{"step": 2}',
    "values of another type": b'{"kind": "train", "step": 2, "tokens": "many", "lm_loss": [], "seconds": {}}',
    "not finite": b'{"kind": "eval", "step": 2, "lm_loss": NaN, "tokens": Infinity}',
    "numbers too large": b'{"kind": "train", "step": 2, "tokens": %s, "lm_loss": %s}' % ((b"9" * 400,) * 2),
}


@pytest.mark.parametrize("case", [*BROKEN, *FOREIGN, *ODD])
def test_a_line_that_no_run_wrote_stops_neither_resume_nor_report_and_loses_no_other(tmp_path, case):
    inserted = (BROKEN | FOREIGN | ODD)[case]
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, 0, [1, 2, 3], tensorboard=False)
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + inserted + b"\n" + b"".join(others))
    lines = metrics_file.read(path)
    assert [x["step"] for x in lines if "tokens_per_second" in x] == [1, 2, 3]
    write_page(tmp_path / "report", Page([read_run(tmp_path, "run")], []))
    write(tmp_path, 3, [4], tensorboard=False)
    kept = path.read_bytes().splitlines(keepends=True)
    stays = case not in BROKEN
    assert kept[: 4 + stays] == [first, *[inserted + b"\n"] * stays, *others]
    assert [x["step"] for x in metrics_file.read(path) if "tokens_per_second" in x] == [1, 2, 3, 4]


def test_what_is_whole_but_for_its_end_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, 0, [1, 2], tensorboard=False)
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    write(tmp_path, 2, [3], tensorboard=False)
    assert path.read_bytes().startswith(whole)


def test_the_start_of_a_process_is_recorded_before_its_first_step(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 10, 0, enabled=True)
    log.start({"step": 0, "world_size": 8, "device": "cpu"})
    assert metrics_file.read(tmp_path / "metrics.jsonl") == []
    log.train(line(1), show=False)
    log.train(line(2), show=False)
    log.close()
    assert [x["kind"] for x in metrics_file.read(tmp_path / "metrics.jsonl")] == ["start", "train", "train"]


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(), 10, 0, enabled=False)
    log.train(line(1), show=True)
    log.close()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import pathlib, sys
from tests.unit.reports.test_metrics import write
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

"""`python -m benchmarks.gpu` runs its parts in order, skips those that have passed, and reports failures."""

import json
import re
import socket
import subprocess
import sys
import time

import pytest

from benchmarks import gpu

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def command(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=gpu.ROOT, capture_output=True, text=True)


def test_help_names_every_part():
    page = command("--help").stdout
    assert all(f"  {part.name:14} {part.about}" in page for part in gpu.PARTS)


def test_an_unknown_part_is_refused_by_name():
    ended = command("kernel")
    assert ended.returncode == 2 and "no such part: kernel; parts are environment, kernels" in ended.stderr


def test_a_part_that_has_passed_is_skipped(tmp_path):
    (tmp_path / "report.json").write_text('{"part": "report", "exit_code": 0}')
    ended = command("report", "--output", tmp_path)
    assert ended.returncode == 0 and ended.stdout.startswith("report         passed before")
    assert [result["part"] for result in json.loads((tmp_path / "all.json").read_text())] == ["report"]


@pytest.mark.parametrize("result", ['{"exit_code"', "", "[]", "{}", '{"exit_code": 1}', '{"exit_code": null}', b"\xff"])
def test_a_damaged_result_does_not_count_as_passed(tmp_path, result):
    (tmp_path / "report.json").write_bytes(result if isinstance(result, bytes) else result.encode())
    assert not gpu.passed(tmp_path / "report.json")


def test_a_part_without_time_left_is_not_started(tmp_path):
    ended = command("environment", "--rehearse", "--budget", 5, "--output", tmp_path)
    assert ended.returncode == 1 and "not started" in ended.stdout and "not passed: environment" in ended.stderr


def test_a_part_that_fails_or_outlasts_its_limit_is_reported(tmp_path):
    fails = gpu.Part("fails", "exits with 3", "this_module_is_missing")
    hangs = gpu.Part("hangs", "never ends", "http.server", ("--bind", "127.0.0.1", "0"))
    assert not gpu.run(fails, tmp_path, 60.0) and not gpu.run(hangs, tmp_path, 1.0)
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fails", "hangs")]
    assert [result["exit_code"] for result in results] == [1, None]
    assert "No module named this_module_is_missing" in results[0]["last_lines"][-1]


WAITS = """
from benchmarks import gpu

gpu.PARTS = (gpu.Part("waits", "never ends", "http.server", ("--bind", "127.0.0.1", "0")),)
gpu.NAMES = ("waits",)
gpu.main()
"""


def test_a_command_that_is_ended_ends_its_part(tmp_path):
    log, command = tmp_path / "waits.log", [sys.executable, "-c", WAITS, "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=gpu.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as ended:
        while not (log.is_file() and (serving := re.search(r"port (\d+)", log.read_text()))):
            assert ended.poll() is None
            time.sleep(0.05)
        ended.terminate()
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", int(serving[1]))), "the part goes on"

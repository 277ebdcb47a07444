"""A run and its benchmarks by one command: both are interrupted, either is killed, and nothing is measured twice."""

import re
import signal
import time

import psutil
import pytest

from distill_nemo.reports.scores import read_scores
from tests.cli.command import PATIENCE, nemo, shrunk, start
from tests.tasks import write_task
from tests.training import metrics

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
OUTPUT = "runs/llama32_3b_to_1b"
STEPS = 100
SETTINGS = {
    "parallelism__tensor_model_parallel_size": 1,
    "parallelism__sequence_parallel": "false",
    "training__steps": STEPS,
    "training__eval_interval": STEPS,
    "training__benchmark_interval": STEPS // 2,
    "checkpoint__save_interval": STEPS,
    "checkpoint__keep_last": 1,
    "checkpoint__export": "false",
    "logging__log_interval": 20,
    "benchmarks__tasks": "ours",
    "benchmarks__include_path": "tasks",
}


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("beside")
    write_task(cwd)
    return cwd


def ranks(command):
    """Return the ranks of the run and of its benchmarks, once both have one."""
    while True:
        assert command.process.poll() is None, command.process.communicate()
        assert time.time() < command.began + PATIENCE
        found = {}
        for process in psutil.Process(command.process.pid).children(recursive=True):
            try:
                words, environment = " ".join(process.cmdline()), process.environ()
            except psutil.Error:
                continue
            if "RANK" in environment and "fdl_runner" in words:
                found.setdefault("benchmarks" if "train-benchmarks" in words else "run", process)
        if len(found) == 2:
            return found
        time.sleep(0.02)


@pytest.fixture(scope="module")
def story(inputs, cwd):
    """Type one command four times: Ctrl-C, the run killed, the benchmarks killed, to the end."""
    arguments = ["train", "--factory", "llama32_3b_to_1b", *shrunk(inputs, **SETTINGS)]
    typed = {}
    for name in ("interrupted", "run killed", "benchmarks killed"):
        command = start(*arguments, cwd=cwd, HF_DATASETS_CACHE=f"{cwd}/cache", HF_HUB_OFFLINE="1")
        processes = ranks(command)
        if name == "interrupted":
            command.at_step(cwd / OUTPUT, 1).signal(signal.SIGINT)
        elif name == "run killed":
            command.at_step(cwd / OUTPUT, 2)
            processes["run"].kill()
        else:
            processes["benchmarks"].kill()
        typed[name] = command.ended()
        assert not psutil.wait_procs(processes.values(), timeout=PATIENCE)[1], "ranks that go on"
    typed["to the end"] = nemo(*arguments, cwd=cwd, HF_DATASETS_CACHE=f"{cwd}/cache", HF_HUB_OFFLINE="1")
    return typed


def test_ctrl_c_stops_both(story):
    ended = story["interrupted"]
    assert ended.code == 130
    assert ended.err == "stopping: waiting for the checkpoint; the same command resumes\n"
    assert "train: started" in ended.out and "train-benchmarks: started" in ended.out


def test_the_benchmarks_end_with_a_run_that_fails(story):
    ended = story["run killed"]
    assert ended.code == 1
    state, error = ended.err.splitlines()
    assert state.startswith("train: FAILED; logs in /")
    assert error.startswith("error: rank 0 was killed by SIGKILL")


def test_a_run_goes_on_without_its_benchmarks_and_the_command_says_so_at_its_end(story, cwd):
    ended = story["benchmarks killed"]
    assert ended.code == 1
    at_once, why, state, error, advice = ended.err.splitlines()
    assert at_once == "train-benchmarks: FAILED; train goes on" and why == error
    assert state.startswith("train-benchmarks: FAILED; logs in /")
    assert error.startswith("error: rank 0 was killed by SIGKILL")
    assert f"nemo distill evaluate steps_of={OUTPUT} tasks=ours include_path=tasks" in advice
    assert f"step {STEPS}/{STEPS}" in ended.out, "the run is complete"


def test_the_same_command_goes_on_and_measures_nothing_twice(story, cwd):
    ended = story["to the end"]
    assert (ended.code, ended.err) == (0, ""), ended
    measured = re.findall(r"step (\d+): ours measured", "".join(each.out for each in story.values()))
    assert measured == [str(STEPS // 2), str(STEPS)]
    lines = [line["step"] for line in metrics(cwd / OUTPUT) if line["kind"] == "train"]
    assert lines == list(range(1, STEPS + 1))
    scores = read_scores(cwd / OUTPUT / "benchmarks" / "scores.json")
    assert list(scores.models) == [f"step {STEPS // 2}", f"step {STEPS}"]

"""A dead rank, Ctrl-C, a loss that is not finite: the exit code shows it, and the same command resumes.

SIGTERM is tested in tests/cli/test_train.py.
"""

import signal

import psutil
import pytest

from tests.cli.command import PATIENCE, STEPS, TWO_RANKS, last_step, nemo, shrunk, start
from tests.training import metrics

pytestmark = pytest.mark.timeout(1800)  # for a busy machine; under two minutes were measured
OUTPUT = "runs/llama32_3b_to_1b"


@pytest.fixture(scope="module")
def story(inputs, tmp_path_factory):
    """Run a command four times: a rank killed, the command killed, Ctrl-C, to the end. Each: Ended, step, newest.

    The first three also return the addresses at which they listened while they trained.
    """
    cwd = tmp_path_factory.mktemp("interrupted")
    arguments = ["train", "--factory", "llama32_3b_to_1b", *shrunk(inputs, checkpoint__export="false"), *TWO_RANKS]
    latest, newest, stops = cwd / OUTPUT / "checkpoints" / "latest", 4, []
    for interrupt in (
        lambda command, ranks: ranks[1].kill(),
        lambda command, ranks: command.signal(signal.SIGKILL),
        lambda command, ranks: command.signal(signal.SIGINT),
    ):
        command = start(*arguments, cwd=cwd).at_step(cwd / OUTPUT, newest)
        ranks, listening = command.ranks(), command.listening()
        interrupt(command.at_step(cwd / OUTPUT, newest + 1), ranks)
        ended = command.ended()
        assert not psutil.wait_procs(ranks.values(), timeout=PATIENCE)[1], "ranks that go on"
        newest = int(latest.read_text()[5:])
        stops.append((ended, last_step(cwd / OUTPUT), newest, listening))
    return [*stops, (nemo(*arguments, cwd=cwd), last_step(cwd / OUTPUT), cwd)]


def test_a_local_run_listens_on_loopback_alone(story):
    assert [listening for *_, listening in story[:3]] == [{"127.0.0.1"}] * 3


def test_ranks_save_and_end_when_the_command_is_killed(story):
    (_, _, before, _), (ended, step, newest, _) = story[:2]
    assert ended.code == -signal.SIGKILL
    assert before < step == newest < STEPS


def test_a_rank_that_is_killed_is_named_and_the_command_fails(story):
    ended, step, newest, _ = story[0]
    assert ended.code == 1
    state, error = ended.err.splitlines()
    assert state.startswith("train: FAILED; logs in /")
    assert error.startswith("error: rank 1 was killed by SIGKILL")
    assert "Traceback" not in ended.out, ended.out
    assert 4 <= newest <= step < STEPS


def test_ctrl_c_is_passed_on_and_shown_in_the_exit_code(story):
    _, (_, _, before, _), (ended, step, newest, _), _ = story
    assert ended.code == 130
    assert f"resumed from {OUTPUT}/checkpoints/step_{before:08d} at step {before} of {STEPS}" in ended.out
    assert "checkpoint written; the same command resumes" in ended.out.splitlines()[-1]
    assert ended.err == "stopping: waiting for the checkpoint; the same command resumes\n"
    assert before < step == newest < STEPS


def test_the_same_command_goes_on_to_the_figures_of_an_uninterrupted_run(story, finished):
    ended, _, cwd = story[3]
    assert (ended.code, ended.err) == (0, "")
    assert metrics(cwd / OUTPUT) == metrics(finished[0] / OUTPUT)


def test_a_loss_that_is_not_finite_is_one_error(others):
    _, (cwd, ended), _ = others
    assert ended.code == 1
    state, error = ended.err.splitlines()
    assert state.startswith("train: FAILED; logs in /")
    assert error.startswith("error: step 2: ") and "not finite" in error and "lower optimizer.lr" in error
    assert all(line.startswith(("train: started", "step ")) for line in ended.out.splitlines()), ended.out
    assert not (cwd / OUTPUT / "checkpoints").exists() and not (cwd / OUTPUT / "student").exists()

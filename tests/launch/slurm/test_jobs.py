"""Runs on a real SLURM: successful, failed, over time limits, and seen from outside."""

import re

import pytest

from distill_nemo.reports.scores import read_scores
from distill_nemo.teacher_store.reader import TeacherStore
from tests.cli.command import STEPS, start
from tests.launch.slurm.conftest import FOREVER, TWO_NODES
from tests.training import metrics

pytestmark = pytest.mark.timeout(2400)  # for a busy machine


def check_failed(ended, state, reason):
    """Check for exit code 1 and, on stderr, two lines: the job's end, and its reason."""
    assert ended.code == 1
    first, second = ended.err.splitlines()
    assert re.fullmatch(rf"train: job \d+ {state}.*; logs in /\S+", first), first
    assert second.startswith("error: ") and re.search(reason, second), second
    assert "Traceback" not in ended.out


def test_two_nodes_to_the_end(stories):
    story = stories["two_nodes"]
    assert (story.ended.code, story.ended.err) == (0, "")
    first, *lines = story.ended.out.splitlines()
    assert re.fullmatch(r"train: submitted as job \d+, experiment train_\d+; logs in /\S+/train", first)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS + STEPS // 4 + 1
    assert all(line.startswith(("step ", "train: job ")) for line in lines), "what torchrun and srun say is in the log"


def test_one_node_and_two_train_alike(stories):
    one, two = metrics(stories["detached"].output), metrics(stories["two_nodes"].output)
    assert one == two and one[-1]["step"] == STEPS


def test_a_detached_run_is_seen_and_followed_to_its_end(stories):
    story = stories["detached"]
    assert (story.ended.code, story.ended.err) == (0, "")
    assert re.search(r"see to it with `nemo distill status\|logs\|cancel experiment=train_\d+`", story.ended.out)
    early, late = story.typed["status"], story.typed["status at the end"]
    assert (early.code, early.err, late.code, late.err) == (0, "", 0, "")
    assert re.match(r"train: job \d+ (PENDING|CONFIGURING|RUNNING|COMPLETED)", early.out)
    assert re.match(r"train: job \d+ COMPLETED on n[12], \S+ of 01:00:00; logs in /", late.out)
    follow, logs = story.typed["follow"], story.typed["logs"]
    assert (follow.code, follow.err, logs.code, logs.err) == (0, "", 0, "")
    assert f"exported step_{STEPS:08d} to runs/llama32_3b_to_1b/student" in follow.out
    assert f"step {STEPS}/{STEPS}" in logs.out
    assert (story.output / "student" / "model.safetensors").is_file()


def test_a_runs_benchmarks_are_a_second_job_that_is_seen_and_followed_with_it(stories):
    story = stories["detached"]
    submitted = re.findall(r"^(\S+): submitted as job \d+", story.ended.out, re.M)
    assert submitted == ["train", "train-benchmarks"] and story.ended.out.count("see to it") == 1
    late = re.findall(r"^(\S+): job \d+ (\w+) on n[12],", story.typed["status at the end"].out, re.M)
    assert late == [("train", "COMPLETED"), ("train-benchmarks", "COMPLETED")]
    assert f"step {STEPS}: ours measured" in story.typed["follow"].out
    assert list(read_scores(story.output / "benchmarks" / "scores.json").models) == [f"step {STEPS}"]


def test_a_rank_that_fails_is_the_commands_failure(stories):
    check_failed(stories["not_finite"].ended, "FAILED", "step 2: .* not finite.*lower optimizer.lr")


def test_a_killed_rank_and_a_job_that_gives_way_are_queued_again_and_go_on(stories):
    story = stories["queued_again"]
    assert (story.ended.code, story.ended.err) == (0, "")
    after_kill, after_term = (
        int(step) for step in re.findall(r"resumed from \S+ at step (\d+) of 80", story.ended.out)
    )
    assert after_kill >= 4 and after_kill % 4 == 0, "the last checkpoint of an interval"
    assert after_term >= after_kill + 7, "the checkpoint that SIGTERM had written"
    assert story.ended.out.count("stopped by signal 15; checkpoint written") == 1
    again = re.findall(r"train: job \d+ was started again: (.*)", story.ended.out)
    assert [why.split(";")[0].split(",")[0] for why in again] == [
        "rank 1 was killed by SIGKILL (perhaps because memory ran out)",
        "it was told to stop",
    ]
    steps = [line["step"] for line in metrics(story.output) if line["kind"] == "train"]
    assert steps == list(range(1, 81))


def test_benchmarks_are_queued_again_as_their_run_is_and_measure_nothing_twice(stories):
    out = stories["queued_again"].ended.out
    submitted = re.findall(r"^(\S+): submitted as job \d+", out, re.M)
    assert submitted == ["train", "train-benchmarks"]
    again = re.findall(r"train-benchmarks: job \d+ was started again: (.*?)[,;]", out)
    assert again == ["it was told to stop"]
    assert re.findall(r"step (\d+): ours measured", out) == ["40", "80"]
    assert list(read_scores(stories["queued_again"].output / "benchmarks" / "scores.json").models) == [
        "step 40",
        "step 80",
    ]


def test_a_recipe_is_launched_from_python(stories):
    story = stories["in_python"]
    assert story.ended.code == 0, story.ended
    assert (story.typed["follow"].code, story.typed["follow"].err) == (0, "")
    assert metrics(story.output)[-1]["step"] == 2


def test_before_the_time_limit_it_saves_is_queued_again_and_goes_on_and_can_be_cancelled(stories):
    story = stories["told_to_stop"]
    stopped = re.search(r"stopped by signal 23; checkpoint written", story.ended.out)
    resumed = re.search(rf"resumed from \S+/step_(\d+) at step (\d+) of {FOREVER}", story.ended.out)
    assert stopped and resumed and stopped.start() < resumed.start()
    seen = re.findall(rf"step (\d+)/{FOREVER}  lm", story.ended.out[: stopped.start()])
    assert int(resumed[2]) == int(seen[-1]), "the checkpoint that the signal asked for"
    steps = [line["step"] for line in metrics(story.output) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
    cancel = story.typed["cancel"]
    assert cancel.code == 0 and re.match(r"train: job \d+ cancelled; it was RUNNING", cancel.out)
    check_failed(story.ended, "CANCELLED", r"SLURM ended it \(CANCELLED\)")


def test_a_time_limit_is_named(stories):
    check_failed(stories["out_of_time"].ended, "TIMEOUT", "it reached its time limit of 00:01:00")


def test_two_nodes_write_a_store(cluster, inputs, tmp_path):
    """Each node's rank is a writer of its own shards."""
    given = [f"teacher.checkpoint={inputs}/teacher", f'data.train=["{inputs}/train"]', "data.sequence_length=16"]
    given += ["windows=12", "shard_windows=2", "dtype=float32", "output=store"]
    executor = ["run.executor=slurm", "run.executor.gpus=false", *TWO_NODES]
    ended = start("teacher", *given, *executor, cwd=tmp_path / "x", **cluster.environment).ended()
    assert ended.code == 0 and "wrote store: 12 windows" in ended.out, ended
    store = TeacherStore(tmp_path / "x" / "store")
    store.check()
    assert (len(store), store.manifest.num_shards) == (12, 6)


def test_what_sbatch_refuses_is_reported_and_nothing_is_left(cluster, inputs, tmp_path):
    from tests.launch.slurm.conftest import Stage

    ended = Stage(cluster, inputs, tmp_path).train("x", "run.executor.devices=2", "run.executor.partition=no").ended()
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: `sbatch` failed: ") and "invalid partition specified: no" in ended.err
    assert not list((tmp_path / "x").glob("home/nemo/experiments/*/*"))

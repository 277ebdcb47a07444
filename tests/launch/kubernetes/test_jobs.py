"""Runs on clusters of Trainer 2.0, 2.1 and 2.3: successful, failed, stopped, and seen from outside."""

import json
import re

import pytest

from distill_nemo.reports.scores import read_scores
from tests.cli.command import STEPS, nemo_here, nemo_home
from tests.launch.kubernetes.conftest import TOKEN
from tests.training import metrics

pytestmark = pytest.mark.timeout(2400)  # for a busy machine


@pytest.fixture
def output_of(monkeypatch, capfd):
    """Return a function that runs `nemo distill COMMAND experiment=...` on a story afterwards."""

    def command(story, *arguments):
        nemo_home(monkeypatch, story.cwd / "home/nemo")
        monkeypatch.setenv("KUBECONFIG", story.cluster.environment["KUBECONFIG"])
        return nemo_here(capfd, arguments[0], f"experiment={story.experiment}", *arguments[1:])

    return command


def check_failed(ended, state, reason):
    """Check for exit code 1 and, on stderr, the job's end and its reason."""
    assert ended.code == 1
    first, second, *more = ended.err.splitlines()
    assert re.fullmatch(rf"train: job train-\w+ {state}.*; logs in /\S+", first), first
    assert second.startswith("error: ") and re.search(reason, second), second
    assert "Traceback" not in ended.out
    return more


def test_two_nodes_to_the_end(stories):
    story = stories["two_nodes"]
    assert (story.ended.code, story.ended.err) == (0, "")
    first, *lines = story.ended.out.splitlines()
    assert re.fullmatch(r"train: submitted as job train-\w+, experiment train_\d+; logs in /\S+/train", first)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS + STEPS // 4 + 1
    assert all(line.startswith(("step ", "train: job ")) for line in lines), "what torchrun says is in the log"


def test_a_secret_reaches_the_ranks_and_nothing_else(stories):
    story = stories["two_nodes"]
    name = re.search(r"job (train-\w+)", story.ended.out)[1]
    pods = [pod for pod in story.cluster.pods.values() if pod.name.startswith(name)]
    assert [pod.environment["HF_TOKEN"] for pod in pods] == [TOKEN, TOKEN]
    others = [each for (kind, *_), each in story.cluster.objects.items() if kind != "Secret"]
    assert TOKEN not in json.dumps(others) and TOKEN not in story.ended.out
    assert TOKEN not in "".join(path.read_text() for path in story.output.rglob("*.yaml"))


def test_one_node_and_two_train_alike(stories):
    one, two = metrics(stories["detached"].output), metrics(stories["two_nodes"].output)
    assert one == two and one[-1]["step"] == STEPS


def test_a_detached_run_is_seen_and_followed_to_its_end(stories, output_of):
    story = stories["detached"]
    assert (story.ended.code, story.ended.err) == (0, "")
    assert re.search(r"see to it with `nemo distill status\|logs\|cancel experiment=train_\d+`", story.ended.out)
    early, follow = story.typed["status"], story.typed["follow"]
    late, logs = output_of(story, "status"), output_of(story, "logs")
    assert [(each.code, each.err) for each in (early, late, follow, logs)] == [(0, "")] * 4
    assert re.match(r"train: job train-\w+ (Pending|Running|Complete), \d pods", early.out)
    assert re.match(r"train: job train-\w+ Complete, 1 pods, \d\d:\d\d:\d\d; logs in /", late.out)
    assert re.search(rf"exported step_{STEPS:08d} to /\S+/student", follow.out)
    assert f"step {STEPS}/{STEPS}" in logs.out
    assert (story.output / "student" / "model.safetensors").is_file()


def test_a_runs_benchmarks_are_a_second_job_that_is_seen_and_followed_with_it(stories, output_of):
    story = stories["detached"]
    assert re.findall(r"^(\S+): submitted as job \S+,", story.ended.out, re.M) == ["train", "train-benchmarks"]
    late = re.findall(r"^(\S+): job \S+ (\w+), 1 pods", output_of(story, "status").out, re.M)
    assert late == [("train", "Complete"), ("train-benchmarks", "Complete")]
    assert f"step {STEPS}: ours measured" in story.typed["follow"].out
    assert list(read_scores(story.output / "benchmarks" / "scores.json").models) == [f"step {STEPS}"]


def test_a_rank_that_fails_is_the_commands_failure(stories):
    check_failed(stories["not_finite"].ended, r"Failed \(JobsFailed\)", "step 2: .* not finite.*lower optimizer.lr")


def test_a_killed_rank_is_named_and_its_pod_goes_on_and_a_cancelled_job_saves(stories, output_of):
    story = stories["started_again"]
    again = r"train: node 1 is started again, because of error: rank 1 was killed by SIGKILL"
    assert re.search(again, story.ended.out)
    resumed = int(re.search(r"resumed from \S+ at step (\d+)", story.ended.out)[1])
    assert resumed >= 4 and resumed % 4 == 0, "the last checkpoint of an interval"
    assert re.match(
        r"train: job train-\w+ cancelled; it was Running, 2 pods.*started again 2 times", story.typed["cancel"].out
    )
    check_failed(story.ended, "Deleted", "the TrainJob was deleted")
    status = output_of(story, "status")
    assert status.code == 1 and "Deleted" in status.out and "the TrainJob was deleted" in status.err
    last = metrics(story.output)[-1]["step"]
    assert (story.output / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}", "SIGTERM had it saved"
    steps = [line["step"] for line in metrics(story.output) if line["kind"] == "train"]
    assert steps == list(range(1, last + 1)), "no step is lost or done twice"


def test_an_image_that_is_not_there(stories, output_of):
    story = stories["no_image"]
    reason = 'node-0-0-\\w+: (ErrImagePull|ImagePullBackOff): failed to pull image "registry.local/no-such:1"'
    (hint,) = check_failed(story.ended, "Pending", f"it does not start: train-\\w+-{reason}")
    assert re.fullmatch(r"it is still queued; `nemo distill cancel experiment=train_\d+` ends it", hint)
    status, cancel = output_of(story, "status"), output_of(story, "cancel")
    assert status.code == 0 and re.search(reason, status.out)
    assert cancel.code == 0 and "cancelled; it was Pending" in cancel.out


def test_ctrl_c_ends_the_watching_and_not_the_job(stories, output_of):
    story = stories["left_alone"]
    job = re.match(r"train: submitted as job (train-\w+), ", story.ended.out)[1]
    assert story.ended.code == 130
    assert re.fullmatch(rf"job {job} continues; `nemo distill cancel experiment=train_\d+` ends it\n", story.ended.err)
    assert ("TrainJob", "default", job) in story.cluster.objects
    assert re.match(rf"train: job {job} cancelled; it was Pending", output_of(story, "cancel").out)


def test_from_python_and_a_deadline_is_named(stories, output_of):
    story = stories["in_python"]
    assert story.ended.code == 0, "NeMo-Run's own"
    assert "step 5/100000  lm loss" in story.ended.out + story.ended.err, "NeMo-Run shows what the ranks say"
    status = output_of(story, "status")
    assert status.code == 1 and re.search(r"scripted: job scripted-\w+ Failed \(DeadlineExceeded\), ", status.out)
    assert re.match(r"error: it reached its time limit after \S+; its ranks had saved; run the same", status.err)
    last = metrics(story.output)[-1]["step"]
    assert (story.output / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}"


def test_scripts_and_functions_run_on_every_rank(stories):
    story = stories["scripts"]
    assert (story.ended.code, story.ended.err) == (0, ""), story.ended
    assert sorted(path.read_text() for path in story.output.glob("rank_*")) == ["0 of 2\n", "1 of 2\n"]
    assert (story.output / "made").is_dir()


def test_the_files_of_a_run_go_with_it_and_the_volume_stays(stories):
    cluster = stories["started_again"].cluster
    owners = [
        each["metadata"]["ownerReferences"][0]["name"]
        for (kind, *_), each in cluster.objects.items()
        if kind == "ConfigMap"
    ]
    jobs = [name for kind, _, name in cluster.objects if kind == "TrainJob"]
    assert sorted(owners) == sorted(jobs) and jobs
    assert ("PersistentVolumeClaim", "default", "work") in cluster.objects

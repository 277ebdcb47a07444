"""One cluster for all tests, and runs on it in two lanes side by side, because most of a run waits."""

import json
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cli.command import PATIENCE, STEPS, Command, Ended, last_step, nemo, shrunk, start
from tests.launch.slurm.cluster import Cluster, install
from tests.tasks import write_task

OUTPUT = "runs/llama32_3b_to_1b"
ONE_NODE = ("run.executor.nodes=1", "run.executor.devices=2")
TWO_NODES = ("run.executor.nodes=2", "run.executor.devices=1")
FOREVER = 100_000  # steps
MEASURED = {"benchmarks__tasks": "ours", "benchmarks__include_path": "tasks", "benchmarks__devices": 1}


@pytest.fixture(scope="session")
def cluster():
    """Return a SLURM of two nodes."""
    install()
    root = Path(tempfile.mkdtemp(prefix="slurm_"))
    root.chmod(0o755)
    with Cluster(root) as running:
        yield running
    shutil.rmtree(root)


@dataclass
class Story:
    """A run: its directory, the output of its command, and of later commands about it."""

    cwd: Path
    ended: Ended
    typed: dict[str, Ended] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.cwd / OUTPUT


@dataclass
class Stage:
    """Setting of a story: the cluster and its commands."""

    cluster: Cluster
    inputs: Path
    root: Path

    def train(self, name, *arguments, **overrides):
        """Start `nemo distill train` on the cluster, in a directory called `name`."""
        overrides = {"checkpoint__export": "false", **overrides}
        recipe = ["train", "--factory", "llama32_3b_to_1b", *shrunk(self.inputs, **overrides)]
        executor = ["run.executor=slurm", "run.executor.gpus=false", *arguments]
        return start(*recipe, *executor, cwd=self.root / name, **self.cluster.environment)

    def output_of(self, name, command, printed, *arguments):
        """Run `nemo distill COMMAND experiment=...` on the experiment that a command has `printed`."""
        experiment = re.search(r"experiment (\w+);", printed)[1]
        arguments = [command, f"experiment={experiment}", *arguments]
        return nemo(*arguments, cwd=self.root / name, **self.cluster.environment)

    def until(self, ready):
        """Wait until `ready()` is true, and return its value."""
        end = time.time() + PATIENCE
        while not (found := ready()):
            assert time.time() < end, self.cluster.run("scontrol", "show", "job")
            time.sleep(0.2)
        return found

    def at_step(self, name, step):
        """Wait until the run in `name` has done `step`."""
        self.until(lambda: (last_step(self.root / name / OUTPUT) or 0) >= step)

    def logged(self, name, attempt, pattern, task="train"):
        """Wait until an attempt's log contains `pattern`, and return the match."""
        logs = f"home/nemo/experiments/train/*/{task}/log-*_{attempt}.out"
        return self.until(
            lambda: re.search(pattern, "".join(path.read_text() for path in (self.root / name).glob(logs)))
        )

    def resumed(self, name, attempt):
        """Return the step from which the run in `name` resumes in this attempt, once it does."""
        return int(self.logged(name, attempt, r"resumed from \S+ at step (\d+)")[1])

    def limit(self, job, minutes):
        """Set another time limit for a job."""
        self.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")

    def job(self, name, place=0):
        """Return SLURM's number of a job submitted from the directory `name`."""
        records = self.until(lambda: (self.root / name / "home/nemo/.slurm_jobs").is_file())
        assert records
        return (self.root / name / "home/nemo/.slurm_jobs").read_text().splitlines()[place].partition(" ")[0]


@pytest.fixture(scope="session")
def stories(cluster, inputs, tmp_path_factory):
    """Return every run on the cluster, by name."""
    stage = Stage(cluster, inputs, tmp_path_factory.mktemp("stories"))
    lanes = (
        [two_nodes, not_finite, queued_again, in_python],
        [detached, told_to_stop, out_of_time],
    )
    with ThreadPoolExecutor(2) as pool:
        played = [pool.submit(lambda lane=lane: {play.__name__: play(stage) for play in lane}) for lane in lanes]
        return {name: story for lane in played for name, story in lane.result().items()}


def two_nodes(stage):
    return Story(stage.root / "two_nodes", stage.train("two_nodes", *TWO_NODES).ended())


def detached(stage):
    """Submit a run and its benchmarks, look at them while they exist, follow them to their end, and look again."""
    name = "detached"
    write_task(stage.root / name)
    measured = {"training__benchmark_interval": STEPS, **MEASURED}
    ended = stage.train(name, *ONE_NODE, "--detach", checkpoint__export="true", **measured).ended()
    typed = {"status": stage.output_of(name, "status", ended.out)}
    typed["follow"] = stage.output_of(name, "logs", ended.out, "follow=true")
    typed["status at the end"] = stage.output_of(name, "status", ended.out)
    typed["logs"] = stage.output_of(name, "logs", ended.out)
    return Story(stage.root / name, ended, typed)


def not_finite(stage):
    """Run until a rank reports why it ends."""
    wild = {"optimizer__lr": 1e30, "optimizer__min_lr": 0, "optimizer__warmup_steps": 0}
    return Story(stage.root / "not_finite", stage.train("not_finite", *TWO_NODES, **wild).ended())


def queued_again(stage):
    """Kill a rank; SLURM sends SIGTERM to every process, as when another job needs the nodes; then run to the end.

    Its benchmarks get SIGURG, as before a time limit, while the run waits in the queue.
    """
    name = "queued_again"
    write_task(stage.root / name)
    steps = {"training__steps": 80, "training__benchmark_interval": 40}
    command = stage.train(name, *ONE_NODE, "run.executor.retries=2", **steps, **MEASURED)
    stage.at_step(name, 41)
    job = stage.job(name)
    rank_of_job(job, 1).kill()
    stage.logged(name, 0, "step 40: ours measured", "train-benchmarks")
    stage.cluster.run("scancel", "--signal=URG", stage.job(name, place=1))
    resumed = stage.resumed(name, attempt=1)
    stage.at_step(name, resumed + 7)
    stage.cluster.run("scancel", "--signal=TERM", job)
    return Story(stage.root / name, command.ended())


def in_python(stage):
    """Run `run.run(recipe, executor=slurm(...))`, then `logs` and `status` of its experiment."""
    cwd = stage.root / "in_python"
    cwd.mkdir()
    (cwd / "script.py").write_text(SCRIPT)
    steps = json.dumps([str(stage.inputs), 2])
    ended = Command([sys.executable, "script.py", steps], cwd, **stage.cluster.environment).ended()
    experiment = next((cwd / "home/nemo/experiments").glob("scripted/scripted_*")).name
    typed = {"follow": stage.output_of("in_python", "logs", f"experiment {experiment};", "follow=true")}
    return Story(cwd, ended, typed)


def told_to_stop(stage):
    """Run towards the time limit: the run saves, ends, is queued again and resumes. Then cancel it."""
    name = "told_to_stop"
    limit = ["run.executor.time=20", "run.executor.stop_seconds=60", "run.executor.retries=1"]
    command = stage.train(name, *ONE_NODE, *limit, training__steps=FOREVER, training__eval_interval=FOREVER)
    stage.at_step(name, 5)
    job = stage.job(name)
    stage.limit(job, 2 + int((time.time() - command.began) / 60))  # however long the start took
    stage.logged(name, 0, "stopped by signal")
    stage.limit(job, 20)
    stage.at_step(name, stage.resumed(name, attempt=1) + 1)
    experiment = next((stage.root / name / "home/nemo/experiments").glob("train/train_*")).name
    typed = {"cancel": stage.output_of(name, "cancel", f"experiment {experiment};")}
    return Story(stage.root / name, command.ended(), typed)


def out_of_time(stage):
    """Let a run be killed at its limit, without notice."""
    limit = ["run.executor.time=1", "run.executor.stop_seconds=0"]
    ended = stage.train("out_of_time", *ONE_NODE, *limit, training__steps=FOREVER).ended()
    return Story(stage.root / "out_of_time", ended)


def rank_of_job(job, rank):
    """Return the process of a job's rank. Helpers and torchrun share its environment or its command line."""
    for process in psutil.process_iter():
        try:
            environment = process.environ() if "nemo_run.core.runners.fdl_runner" in process.cmdline() else {}
        except psutil.Error:
            continue
        if environment.get("SLURM_JOB_ID") == job and environment.get("RANK") == str(rank):
            return process
    raise AssertionError(f"job {job} has no rank {rank}")


SCRIPT = """\
import json
import sys

import nemo_run as run

from distill_nemo.executors import slurm
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    inputs, steps = json.loads(sys.argv[1])
    recipe = llama32_3b_to_1b(teacher=f"{inputs}/teacher", student=f"{inputs}/student")
    recipe.data.train, recipe.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    recipe.data.tokenizer, recipe.data.sequence_length = f"{inputs}/tokenizer", 32
    recipe.optimizer.warmup_steps = 1
    recipe.training.steps, recipe.training.global_batch_size = steps, 2
    recipe.training.micro_batch_size = 1
    recipe.parallelism.tensor_model_parallel_size, recipe.parallelism.sequence_parallel = 2, True
    recipe.checkpoint.export = False
    run.run(recipe, executor=slurm(devices=2, gpus=False), name="scripted", detach=True)
"""

"""A cluster for each version of Trainer, and runs on them in three lanes side by side, since most of a run waits."""

import base64
import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cli.command import PATIENCE, STEPS, Command, Ended, last_step, nemo, shrunk, start
from tests.launch.kubernetes.cluster import clusters as all_clusters
from tests.launch.kubernetes.pods import IMAGES
from tests.launch.kubernetes.schemas import fetch
from tests.tasks import write_task

ONE_NODE = ("run.executor.nodes=1", "run.executor.devices=2")
TWO_NODES = ("run.executor.nodes=2", "run.executor.devices=1")
FOREVER = 100_000  # steps
TOKEN = "not-to-be-seen-4711"


@pytest.fixture(scope="session")
def clusters(inputs, tmp_path_factory):
    """Return the clusters by version, each with the volume `work` and the inputs on it."""
    fetch()
    with all_clusters(tmp_path_factory.mktemp("clusters")) as running:
        for cluster in running.values():
            (cluster.claim("default", "work") / "inputs").symlink_to(inputs)
            data = {"token": base64.b64encode(TOKEN.encode()).decode()}
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "type": "Opaque", "data": data}
            cluster.create("default", secret)
        yield running


@dataclass
class Story:
    """A run: its cluster, its output directory, the output of its command, and of later commands about it."""

    cluster: object
    output: Path
    ended: Ended
    cwd: Path
    typed: dict[str, Ended] = field(default_factory=dict)

    @property
    def experiment(self):
        """Id of the submitted experiment."""
        (found,) = (path.name for path in (self.cwd / "home/nemo/experiments").glob("*/*_*"))
        return found


@dataclass
class Stage:
    """Setting of a story: a cluster, and a directory for its commands."""

    cluster: object
    name: str
    root: Path

    @property
    def mount(self):
        """Path of the volume in the pods, which exists on this machine too."""
        return self.cluster.root / "mounted" / "work"

    @property
    def output(self):
        return self.cluster.claim("default", "work") / self.name

    @property
    def cwd(self):
        return self.root / self.name

    def executor(self, *arguments):
        fields = {"image": IMAGES[0], "gpus": "false", "pvc": "work", "mount": self.mount, "pvc_size": "1Gi"}
        fields["trainer_version"] = self.cluster.trainer
        return [
            "run.executor=kubernetes",
            *(f"run.executor.{name}={value}" for name, value in fields.items()),
            *arguments,
        ]

    def arguments(self, *arguments, **overrides):
        """Return the arguments of `nemo distill train` on the cluster."""
        overrides = {"checkpoint__export": "false", "output_dir": self.mount / self.name, **overrides}
        recipe = ["train", "--factory", "llama32_3b_to_1b", *shrunk(self.mount / "inputs", **overrides)]
        return [*recipe, *self.executor(*arguments)]

    def train(self, *arguments, **overrides):
        """Start `nemo distill train` on the cluster."""
        return start(*self.arguments(*arguments, **overrides), cwd=self.cwd, **self.cluster.environment)

    def output_of(self, command, *arguments):
        """Run `nemo distill COMMAND experiment=...` on the experiment submitted from this story's directory."""
        (experiment,) = (path.name for path in (self.cwd / "home/nemo/experiments").glob("*/*_*"))
        return nemo(command, f"experiment={experiment}", *arguments, cwd=self.cwd, **self.cluster.environment)

    def until(self, ready):
        """Wait until `ready()` is true, and return its value."""
        end = time.time() + PATIENCE
        while not (found := ready()):
            assert time.time() < end, self.cluster.objects
            time.sleep(0.1)
        return found

    def at_step(self, step):
        self.until(lambda: (last_step(self.output) or 0) >= step)

    def story(self, ended, **typed):
        return Story(self.cluster, self.output, ended, self.cwd, typed)


@pytest.fixture(scope="session")
def stories(clusters, tmp_path_factory):
    """Return every run on the clusters, by name."""
    root = tmp_path_factory.mktemp("stories")
    lanes = ([two_nodes, not_finite, scripts], [detached, started_again], [no_image, left_alone, in_python])
    trainers = {"not_finite": "2.0", "detached": "2.1"}

    def play(lane):
        return {
            each.__name__: each(Stage(clusters[trainers.get(each.__name__, "2.3")], each.__name__, root))
            for each in lane
        }

    with ThreadPoolExecutor(len(lanes)) as pool:
        return {
            name: story
            for played in [pool.submit(play, lane) for lane in lanes]
            for name, story in played.result().items()
        }


def two_nodes(stage):
    secrets = json.dumps({"HF_TOKEN": "hub/token"})
    return stage.story(stage.train(*TWO_NODES, f"run.executor.secrets={secrets}").ended())


def detached(stage):
    """Submit a run and its benchmarks, look at them while they exist, and follow them to their end."""
    write_task(stage.cluster.claim("default", "work") / "asked")
    measured = {"training__benchmark_interval": STEPS, "benchmarks__tasks": "ours", "benchmarks__devices": 1}
    measured["benchmarks__include_path"] = stage.mount / "asked" / "tasks"
    offline = 'run.executor.env={"HF_HUB_OFFLINE": "1"}'
    ended = stage.train(*ONE_NODE, "--detach", offline, checkpoint__export="true", **measured).ended()
    return stage.story(ended, status=stage.output_of("status"), follow=stage.output_of("logs", "follow=true"))


def not_finite(stage):
    """Run until a rank reports why it ends."""
    wild = {"optimizer__lr": 1e30, "optimizer__min_lr": 0, "optimizer__warmup_steps": 0}
    return stage.story(stage.train(*TWO_NODES, **wild).ended())


def started_again(stage):
    """Kill a rank, whose pod starts again. Then cancel the job: the ranks save."""
    forever = {"training__steps": FOREVER, "training__eval_interval": FOREVER}
    command = stage.train(*TWO_NODES, "run.executor.runtime=again", **forever)
    stage.at_step(5)
    rank(stage.output, 1).kill()
    log = next(pod for pod in stage.cluster.pods.values() if _is_of(pod.job, stage)).root / "log.1"
    resumed = stage.until(lambda: log.exists() and re.search(r"resumed from \S+ at step (\d+)", log.read_text()))
    stage.at_step(int(resumed[1]) + 6)
    cancel = stage.output_of("cancel")
    return stage.story(command.ended(), cancel=cancel)


def no_image(stage):
    """Submit a run that never starts. The command reports it and gives up."""
    return stage.story(stage.train(*ONE_NODE, "run.executor.image=registry.local/no-such:1").ended())


def left_alone(stage):
    """Press Ctrl-C while the job waits."""
    command = stage.train(*ONE_NODE, "run.executor.gpus=true")
    first_line = command.process.stdout.readline()
    command.signal(signal.SIGINT)
    ended = command.ended()
    return stage.story(Ended(ended.code, first_line + ended.out, ended.err))


def in_python(stage):
    """Run `run.run(recipe, executor=kubernetes(...))`, watched by NeMo-Run, to its deadline, when the ranks save."""
    command = _script(stage, RECIPE)
    stage.at_step(5)
    jobs = [each for (kind, *_), each in stage.cluster.objects.items() if kind == "TrainJob"]
    job = next(each for each in jobs if _is_of(each["metadata"]["name"], stage))
    job["spec"]["activeDeadlineSeconds"] = 1
    return stage.story(command.ended())


def scripts(stage):
    """Run a `run.Script` in a shell, and a `run.Partial` that is not one of our recipes, on two nodes."""
    return stage.story(_script(stage, SCRIPT).ended())


def _script(stage, text):
    stage.cwd.mkdir()
    (stage.cwd / "script.py").write_text(text)
    about = {"image": IMAGES[0], "pvc": "work", "mount": str(stage.mount), "gpus": False}
    about["trainer_version"] = stage.cluster.trainer
    arguments = [sys.executable, "script.py", json.dumps(about), stage.mount / stage.name]
    return Command(arguments, stage.cwd, **stage.cluster.environment)


def _is_of(job, stage):
    """Return True if a TrainJob was submitted from this story, by its config."""
    files = stage.cluster.objects.get(("ConfigMap", "default", job), {"data": {}})["data"]
    return any(f"output_dir: {stage.mount / stage.name}\n" in text for text in files.values())


def rank(output, number):
    """Return the process of a rank of the run that writes to `output`. Its helpers are not torchrun's children."""
    for process in psutil.process_iter():
        try:
            line, environment, parent = process.cmdline(), process.environ(), process.parent()
            ours = "distill_nemo" in line and environment.get("RANK") == str(number)
            if (
                ours
                and any("torchrun" in word for word in parent.cmdline())
                and output.name in Path(line[-1]).read_text()
            ):
                return process
        except (psutil.Error, OSError, AttributeError):
            continue
    raise AssertionError(f"no rank {number} of {output}")


RECIPE = """\
import json
import sys

import nemo_run as run

from distill_nemo.executors import kubernetes
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    about, output = json.loads(sys.argv[1]), sys.argv[2]
    inputs = f"{about['mount']}/inputs"
    recipe = llama32_3b_to_1b(teacher=f"{inputs}/teacher", student=f"{inputs}/student")
    recipe.output_dir = output
    recipe.data.train, recipe.data.valid = [f"{inputs}/train"], [f"{inputs}/valid"]
    recipe.data.tokenizer, recipe.data.sequence_length = f"{inputs}/tokenizer", 32
    recipe.optimizer.warmup_steps, recipe.training.micro_batch_size = 1, 1
    recipe.parallelism.tensor_model_parallel_size, recipe.parallelism.sequence_parallel = 1, False
    recipe.training.steps, recipe.training.eval_interval, recipe.training.global_batch_size = 100_000, 100_000, 2
    recipe.logging.log_interval = 1
    run.run(recipe, executor=kubernetes(time="01:00:00", **about), name="scripted")
"""

SCRIPT = """\
import json
import os
import sys

import nemo_run as run

from distill_nemo.executors import WatchedExperiment, kubernetes

if __name__ == "__main__":
    about, output = json.loads(sys.argv[1]), sys.argv[2]
    shell = "mkdir -p " + output + "; echo $RANK of $WORLD_SIZE > " + output + "/rank_$RANK"
    partial = run.Partial(os.makedirs, name=output + "/made", exist_ok=True)
    with WatchedExperiment.titled("scripts") as experiment:
        for task, name in ((run.Script(inline=shell), "shell"), (partial, "partial")):
            experiment.add(task, executor=kubernetes(nodes=2, **about), name=name)
        experiment.run()
"""

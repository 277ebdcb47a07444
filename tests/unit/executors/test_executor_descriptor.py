"""A new kind of executor is one descriptor: the command line uses nothing else of it."""

import re
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run
import pytest
from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

from distill_nemo.executors import EXECUTORS, kubernetes, local, slurm
from distill_nemo.executors.descriptor import ExecutorDescriptor, WorkDir
from distill_nemo.fields import require
from tests.cli.command import nemo_here, nemo_home

TRAIN = ("train", "llama32_3b_to_1b", "data.train=['1']", "run.executor=cloud")


@dataclass(kw_only=True)
class CloudExecutor(run.LocalExecutor):
    """An executor that the package does not know."""

    region: str = "north"
    internal: str = ""


def cloud(machines: int = 2) -> run.Config[CloudExecutor]:
    """Return a cloud.

    Args:
        machines: number of machines.
    """
    return run.Config(CloudExecutor, ntasks_per_node=machines, launcher="torchrun")


def check(executor):
    require(executor.region != "moon", "run.executor.region = moon is too far")


def preflight(config, executor, dryrun):
    require(dryrun, f"no cloud for {config.output_dir}")


@pytest.fixture(autouse=True)
def described(monkeypatch, tmp_path):
    nemo_home(monkeypatch, tmp_path / "nemo")
    descriptor = ExecutorDescriptor(
        CloudExecutor,
        cloud,
        hidden=("internal",),
        check=check,
        work_dir=lambda executor: WorkDir() if executor.region == "south" else WorkDir(fresh="in a cloud"),
        preflight=preflight,
        manifest=lambda job, directory: f"{job.id} in {job.executor.region}, {Path(directory).is_dir()}",
    )
    monkeypatch.setattr("distill_nemo.executors.known.EXECUTORS", {"cloud": descriptor, **EXECUTORS})
    monkeypatch.setitem(EXECUTORS, "cloud", descriptor)
    monkeypatch.setitem(EXECUTOR_MAPPING, CloudExecutor, EXECUTOR_MAPPING[run.LocalExecutor])


def test_help_lists_the_arguments_of_a_new_executor(capfd):
    page = nemo_here(capfd, "train", "--help").out
    field = "run.executor.machines: int = 2            number of machines."
    assert f"run.executor=cloud: Return a cloud.\n  {field}" in page


def test_a_dry_run_prints_its_manifest(capfd):
    ended = nemo_here(capfd, *TRAIN, "run.executor.region=south", "--dryrun")
    assert (ended.code, ended.out) == (0, "train in south, True\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.executor.internal=x"], 'unknown field "run.executor.internal"'),
        (["run.executor.region=moon"], "run.executor.region = moon is too far"),
        ([], 'output_dir = "runs/llama32_3b_to_1b" is relative, and the job runs in a cloud'),
        (
            ["run.executor.region=south", "run.executor.machines=3"],
            "not divisible by micro_batch_size 8 x data parallel size 3",
        ),
        (["run.executor.region=south"], "no cloud for runs/llama32_3b_to_1b"),
    ],
)
def test_a_new_executor_refuses_before_anything_starts(capfd, arguments, message):
    ended = nemo_here(capfd, *TRAIN, *arguments)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ") and message in ended.err


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (local, {"processes": "2"}, "processes must be int, got '2'"),
        (
            slurm,
            {"setup": "module load"},
            """setup must be list[str] | None, such as '["a", "b"]', got 'module load'""",
        ),
        (slurm, {"container_mounts": "/a:/b"}, "container_mounts must be list[str]"),
        (slurm, {"nodes": 1.5}, "nodes must be int, got 1.5"),
        (kubernetes, {"tolerations": "gpu"}, "tolerations must be list[str]"),
        (kubernetes, {"image_pull_secrets": "ours"}, "image_pull_secrets must be list[str]"),
        (kubernetes, {"env": ["A=1"]}, "env must be dict[str, str]"),
    ],
)
def test_in_python_arguments_of_another_type_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"run.executor.{message}")):
        make(**arguments)


def test_relative_paths_mean_the_same_only_in_this_processs_directory(tmp_path, monkeypatch):
    assert not WorkDir(here=tmp_path).is_current and not WorkDir().is_current and WorkDir(here=Path()).is_current
    monkeypatch.chdir(tmp_path)
    assert WorkDir(here=tmp_path).is_current

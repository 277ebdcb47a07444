"""Names on the hub in the configs of jobs, before a launcher starts them."""

import json

import nemo_run as run
import pytest

from distill_nemo.checkpoint.hub_models import described, downloaded, named, pinned
from distill_nemo.cli.compress import with_commits
from distill_nemo.cli.launch import pin_models
from distill_nemo.config import (
    CorpusConfig,
    ExportConfig,
    PruneConfig,
    RunConfig,
    StoreConfig,
    StudentConfig,
    TeacherConfig,
)
from distill_nemo.config_files import to_dict
from distill_nemo.executors import kubernetes, local
from distill_nemo.executors.preflight import check_launch
from distill_nemo.executors.worker_config import job_config_of
from distill_nemo.pruning.stages import CompressConfig
from distill_nemo.teacher_store_jobs.entry import teacher
from tests.hub_downloads import Hub, asked


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub, asked(hub.url, tmp_path / "home"):
        hub.commit("org/model", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"0" * 100})
        yield hub
    assert hub.strange == []


def run_of(name="org/model"):
    run = RunConfig("out", StudentConfig(name), TeacherConfig(name))
    run.data.tokenizer = name
    return run


CONFIGS = {
    "train": run_of,
    "export": lambda: ExportConfig("org/run", "out", tokenizer="org/model"),
    "prune": lambda: PruneConfig(model="org/model", output="out", data="corpus"),
    "teacher": lambda: StoreConfig("out", TeacherConfig("org/model")),
    "compress": lambda: CompressConfig(teacher="org/model", output="out"),
}


@pytest.mark.parametrize("job", CONFIGS)
def test_every_job_has_directories_in_place_of_names_and_records_have_the_names(hub, tmp_path, job):
    told = []
    config = CONFIGS[job]()
    fixed = pinned(config, told.append)
    commit = hub.repositories["org/model"].revisions["main"]
    assert told and all(line.endswith(f": org/model is at {commit}") for line in told)
    assert repr(fixed) == repr(config).replace("'org/model'", f"'org/model@{commit}'")
    assert pinned(fixed, told.append) == fixed and len(told) == repr(fixed).count(commit)
    local = downloaded(fixed)
    directory = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / commit
    assert repr(local) == repr(config).replace("'org/model'", f"'{directory}'")
    assert (directory / "model.safetensors").is_file() == (job != "export")
    assert named(local) == fixed and described(fixed) == local


def test_a_store_goes_on_with_the_commit_of_its_manifest(hub, tmp_path):
    before = hub.repositories["org/model"].revisions["main"]
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoint": f"org/model@{before}", "tokenizer": None}))
    after, told = hub.commit("org/model", {"config.json": b"{ }"}), []
    config = pinned(StoreConfig(str(tmp_path), TeacherConfig("org/model")), told.append)
    assert config.teacher.checkpoint == f"org/model@{before}"
    assert told == [f"teacher.checkpoint: org/model is at {after} now; the job goes on with {before}, as it began"]
    config = pinned(StoreConfig(str(tmp_path), TeacherConfig("org/model@main")), told.append)
    assert config.teacher.checkpoint == f"org/model@{after}"  # as it says, whatever was before


def test_a_compression_goes_on_with_the_commit_of_its_first_round(hub, tmp_path):
    config = CompressConfig(teacher="org/model", output=str(tmp_path))
    begun = pinned(config, lambda _: None)
    step = tmp_path / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step / "run.json").write_text(json.dumps(to_dict(begun.run(1))))
    hub.commit("org/model", {"config.json": b"{ }"})
    assert with_commits(config) == begun


@pytest.mark.parametrize("here", [True, False])
def test_the_launcher_pins_and_downloads_only_where_the_ranks_see_its_disk(hub, inputs, tmp_path, here):
    executor = local() if here else kubernetes(image="i", nodes=1, devices=1)
    task = run.Partial(teacher, output=f"{tmp_path}/store", teacher=run.Config(TeacherConfig, checkpoint="org/model"))
    task.data = run.Config(CorpusConfig, train=[str(inputs / "train")], sequence_length=32)
    config = job_config_of(task, StoreConfig)
    if here:
        check_launch(config, executor)  # which looks for no directory of that name
    pin_models(task, config, executor)
    assert ("@" in job_config_of(task, StoreConfig).teacher.checkpoint) == here
    assert any(request.startswith("GET /cdn") for request in hub.requests) == here

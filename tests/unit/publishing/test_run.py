"""Runs and exports that push to the hub's double, and what the launcher asks before it starts one."""

from dataclasses import replace

import pytest

from distill_nemo.checks import check, check_job
from distill_nemo.config import CheckpointConfig, ExportConfig
from distill_nemo.executors import check_launch, kubernetes, local, slurm
from distill_nemo.pruning.stages import CompressConfig
from tests.hub import TOKEN, Fault, Hub, serving, talking_to
from tests.training import changed, tiny_run


def run_and_export(inputs, output, url):
    """Train, train again with the same command, and export the same step elsewhere. Return what was refused."""
    from distill_nemo.checkpoint.export import export
    from distill_nemo.training.entry import run_config

    run = changed(tiny_run(inputs, output, steps=1), {"optimizer.warmup_steps": 0})
    run.checkpoint = CheckpointConfig(push_to="ORG/student")
    with talking_to(url, output):
        run_config(run)
        run_config(run)
        again = ExportConfig(str(output), f"{output}/again", push_to="ORG/student")
        refused = ""
        try:
            export(again)
        except ValueError as error:
            refused = str(error)
        export(replace(again, push_to="ORG/student@again"))
    return refused


@pytest.fixture(scope="module")
def pushed(inputs, one, tmp_path_factory):
    output = tmp_path_factory.mktemp("pushed")
    with serving(Hub()) as hub:
        hub.user(TOKEN, "ORG")
        return hub, output, one.run(run_and_export, inputs, output, hub.url)[0]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_run_pushes_what_it_exports_once(pushed):
    hub, output, _ = pushed
    assert hub.refused == []
    assert hub.titles("ORG/student") == ["initial commit", "Upload a distilled student"]
    found = hub.files("ORG/student")
    del found[".gitattributes"]
    assert found == files(output / "student")
    assert sum(hub.sent.values()) == (output / "student" / "model.safetensors").stat().st_size


def test_an_export_pushes_and_sends_no_weights_that_the_hub_has(pushed):
    hub, output, refused = pushed
    assert refused.startswith("push_to = ORG/student holds files that this output has not pushed: ")
    assert hub.files("ORG/student", "again").keys() - {".gitattributes"} == files(output / "again").keys()


def test_the_card_of_a_run_is_pushed_with_it_and_names_no_place(inputs, pushed):
    hub, output, _ = pushed
    card = hub.files("ORG/student")["README.md"].decode()
    assert "# ORG/student\n" in card and "distilled from `teacher`" in card and "- 1 steps of 4 sequences" in card
    assert "| forward KL to the teacher" in card
    for place in (inputs, output):
        assert not [part for part in (str(place), str(place.parent), place.parent.name) if part in card]


def test_the_token_is_in_no_file_of_the_run(pushed):
    _, output, _ = pushed
    everything = [path for path in output.rglob("*") if path.is_file()]
    assert len(everything) > 10
    assert not [path for path in everything if TOKEN.encode() in path.read_bytes()]


def config(inputs, **push):
    run = tiny_run(inputs, inputs / "out")
    run.checkpoint = CheckpointConfig(push_to="ORG/student", **push)
    return run


def job(kind, **fields):
    return {"slurm": slurm, "kubernetes": kubernetes, "local": local}[kind](**fields)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("local", {}), ("slurm", {"devices": 1}), ("kubernetes", {"image": "x", "pvc": "work"})],
)
def test_a_launch_without_a_token_for_the_ranks_is_refused(inputs, monkeypatch, kind, fields):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run = replace(config(inputs), output_dir="/workspace/out")
    with pytest.raises(
        ValueError, match=r"push_to = ORG/student needs a token where the job runs: export HF_TOKEN bef"
    ):
        check_launch(run, job(kind, **fields), dryrun=True)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("slurm", {"host": "login", "user": "me", "job_dir": "/jobs", "workdir": "/work"}),
        ("kubernetes", {"image": "x", "pvc": "work", "secrets": {"HF_TOKEN": "hub/token"}}),
    ],
)
def test_a_token_that_only_the_ranks_have_is_not_asked_for_here(inputs, monkeypatch, kind, fields):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    check_launch(replace(config(inputs), output_dir="/workspace/out"), job(kind, **fields), dryrun=True)


def test_a_launch_asks_the_hub_first_and_a_dry_run_does_not(inputs, hub, monkeypatch):
    check_launch(config(inputs), local(), dryrun=True)
    assert hub.requests == []
    check_launch(config(inputs), local())
    assert hub.titles("ORG/student") == ["initial commit"]
    hub.user(TOKEN, "OTHER")
    with pytest.raises(ValueError, match="the token in HF_TOKEN may not write there: export one with write access"):
        check_launch(config(inputs), local())


def test_a_login_node_without_a_network_leaves_it_to_the_job(inputs, hub, monkeypatch, capsys):
    hub.faults.append(Fault("GET /", times=9))
    hub.faults.append(Fault("POST /", times=9))
    check_launch(config(inputs), local())
    assert capsys.readouterr().err.startswith("warning: push_to = ORG/student on http://127.0.0.1")


def test_only_the_last_round_of_a_compression_is_pushed():
    push = CheckpointConfig(push_to="ORG/student", push_overwrite=True, save_interval=7)
    whole = CompressConfig(teacher="t", output="o", rounds=2, checkpoint=push)
    assert whole.run(1).checkpoint == CheckpointConfig(save_interval=7)
    assert whole.run(2).checkpoint == push


def test_a_run_that_exports_nothing_pushes_nothing(inputs):
    with pytest.raises(ValueError, match=r"checkpoint\.push_to needs checkpoint\.export; set both"):
        check(config(inputs, export=False), 1)
    with pytest.raises(ValueError, match="is not ORG/NAME"):
        check_job(ExportConfig("a", "b", push_to="student"), 1)

"""Steps of a run that another process reads while the run deletes them."""

import os
import shutil

import pytest

from distill_nemo.checkpoint.directory import benchmarks_of, delete, linked, prune
from distill_nemo.models.sources import saved_steps
from distill_nemo.reports.scores import Scores, write_scores
from distill_nemo.runtime.checksums import identity_of

FILES = {"run.json": "{}", ".metadata": "table", "modelopt_state/.metadata": "other table", "__0_0.distcp": "weights"}


@pytest.fixture
def step(tmp_path):
    return saved(tmp_path / "checkpoints", 4)


def saved(root, number, files=FILES):
    """Save a step as a run does: aside, then in place of one that is there."""
    step, partial = root / f"step_{number:08d}", root / f"step_{number:08d}.partial"
    for name, text in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text)
    if step.is_dir():
        delete(step)
    return partial.rename(step)


def contents(directory):
    return {str(file.relative_to(directory)): file.read_text() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_linked_step_stays_whole_when_its_run_deletes_it(step, tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    assert linked(step, tmp_path / "held")
    newest = saved(step.parent, 8)
    prune(newest, keep_last=1)
    assert list(step.parent.iterdir()) == [newest]
    assert contents(tmp_path / "held") == FILES


def refused(*paths):
    raise PermissionError("this file system has no links")


@pytest.mark.parametrize("links", range(len(FILES) + 1))
def test_a_step_that_is_deleted_while_it_is_linked_is_gone(step, tmp_path, monkeypatch, links):
    link, done = os.link, []

    def after_some(source, target):
        if len(done) == links:
            delete(step)
        done.append(link(source, target))

    monkeypatch.setattr(os, "link", after_some)
    if links == len(FILES):
        delete(step)
    assert not linked(step, tmp_path / "held")
    assert not (tmp_path / "held").exists() and not step.exists()


@pytest.mark.parametrize("links", range(len(FILES)))
def test_a_step_that_is_saved_again_while_it_is_linked_is_no_mixture_of_both(step, tmp_path, monkeypatch, links):
    again = {name: f"{text} of the resumed run" for name, text in FILES.items()} | {"__0_1.distcp": "of another rank"}
    link, done = os.link, []

    def after_some(source, target):
        if len(done) == links:
            saved(step.parent, 4, again)
        done.append(link(source, target))

    monkeypatch.setattr(os, "link", after_some)
    assert linked(step, tmp_path / "held")
    assert contents(tmp_path / "held") == again


def test_a_step_whose_deletion_was_killed_is_gone_and_the_rest_goes_with_the_next(step, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        delete(step)
    assert saved_steps(step.parent) == [] and not linked(step, tmp_path / "held")
    newest = saved(step.parent, 8)
    prune(newest, keep_last=1)
    assert list(step.parent.iterdir()) == [newest]


def test_a_step_that_is_saved_again_stays_until_it_is_measured_again(step, tmp_path):
    (step / "SHA256SUMS").write_text("of the first\n")
    measured(tmp_path, step)
    saved(step.parent, 4, FILES | {"SHA256SUMS": "of another\n"})
    newest = saved(step.parent, 8)
    prune(newest, keep_last=1, benchmark_interval=4)
    assert step.is_dir(), "its scores are of the first"
    measured(tmp_path, step)
    prune(newest, keep_last=1, benchmark_interval=4)
    assert not step.exists()


def measured(run, step):
    """Write scores as the benchmarks of a run do."""
    path = benchmarks_of(run, int(step.name[5:]))
    path.parent.mkdir(exist_ok=True)
    write_scores(path, Scores({"step 4": str(step)}, identities={"step 4": identity_of(step)}))


def test_a_step_that_cannot_be_copied_is_an_error(step, tmp_path):
    (tmp_path / "held").write_text("in the way")
    with pytest.raises(OSError, match="held"):
        linked(step, tmp_path / "held")

"""Damaged and hostile checkpoints: fallbacks and refusals. Nothing in a checkpoint is executed."""

import contextlib
import io
import json
import os
import pickle
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from distill_nemo.config import ExportConfig, ParallelismConfig, StudentConfig
from tests.hostile import Runs, plant, write_sums
from tests.training import changed, metrics, tiny_run

OLDER, NEWEST = "step_00000002", "step_00000004"


def train(inputs, output, changes=None):
    """Run once on this rank, and return the output."""
    from distill_nemo.training.entry import run_config

    printed = io.StringIO()
    run = changed(tiny_run(inputs, output), {"checkpoint.save_interval": 2, "optimizer.decay_steps": 8})
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        run_config(changed(run, changes or {}))
    return printed.getvalue()


@pytest.fixture(scope="module")
def saved(inputs, one, tmp_path_factory):
    """Return a run of four steps that has saved two checkpoints."""
    output = tmp_path_factory.mktemp("saved")
    one.run(train, inputs, output, {"training.steps": 4})
    return output


def search(damaged):
    """Return {case: (directory found, output)} for copies of a run, each with its own damage."""
    from distill_nemo.checkpoint.load import newest_whole
    from distill_nemo.runtime.process_groups import process_groups

    found = {}
    with process_groups(ParallelismConfig()):
        for case, root in damaged.items():
            printed = io.StringIO()
            with contextlib.redirect_stderr(printed):
                try:
                    name = getattr(newest_whole(root), "name", None)
                except ValueError as error:
                    name, printed = "refused", io.StringIO(str(error))
            found[case] = (name, printed.getvalue())
    return found


def copies(saved, where, damages):
    """Return {case: root} of copies of the run's checkpoints, each damaged by its function."""
    roots = {}
    for number, (case, damage) in enumerate(damages.items()):
        roots[case] = shutil.copytree(saved / "checkpoints", where / str(number))
        damage(roots[case])
    return roots


def rewritten(name, change, sums=False):
    """Return a function that damages one file of the newest checkpoint; with `sums`, it also updates the sums."""

    def damage(root):
        path = root / NEWEST / name
        path.write_bytes(change(path.read_bytes()))
        if sums:
            write_sums(root / NEWEST)

    return damage


def without(name):
    return lambda content: b"".join(line for line in content.splitlines(True) if name not in line)


SUMS = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut after a line": lambda content: content[: content.index(b"\n") + 1],
    "no text": lambda content: b"\xff\xfe\x00" * 9,
    "zeros": lambda content: bytes(len(content)),
    "a line twice": lambda content: content + content[: content.index(b"\n") + 1],
    "a parent": lambda content: content + b"0" * 64 + b"  ../latest\n",
    "an absolute path": lambda content: content + b"0" * 64 + b"  /etc/passwd\n",
    "upper case": lambda content: content.upper(),
    "other sums": lambda content: content.replace(b"a", b"b"),
    **{f"without {name}": without(name.encode()) for name in ("run.json", "architecture.json", ".metadata")},
    **{f"without {name}": without(name.encode()) for name in ("metadata.json", "__0_0.distcp")},
}


def as_directory(name):
    def damage(root):
        path = root / NEWEST / name
        path.unlink()
        path.mkdir()

    return damage


UNREADABLE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-20],
    "a list": lambda content: b"[]",
    "no text": lambda content: b"\xff" * 40,
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda content: b"[" * 100_000,
}


def lacking(*path):
    def change(content):
        record = json.loads(content)
        where = record
        for name in path[:-1]:
            where = where[name]
        del where[path[-1]]
        return json.dumps(record).encode()

    return change


DAMAGED = {
    **{f"sums: {case}": rewritten("SHA256SUMS", change) for case, change in SUMS.items()},
    **{f"{n}: {c}": rewritten(f"{n}.json", f, True) for n in ("run", "architecture") for c, f in UNREADABLE.items()},
    **{
        f"run.json without {'.'.join(path)}": rewritten("run.json", lacking(*path), True)
        for path in [("training",), ("data",), ("teacher",), ("training", "steps"), ("training", "seed")]
    },
    **{f"{name} is a directory": as_directory(name) for name in ("run.json", "SHA256SUMS", "__0_0.distcp")},
    **{f".metadata {case}, with sums": rewritten(".metadata", f, True) for case, f in UNREADABLE.items()},
    ".metadata of something else": rewritten(".metadata", lambda _: pickle.dumps({"a": 1}), True),
    "nothing is there": lambda root: [path.unlink() for path in (root / NEWEST).iterdir()],
}


def test_every_damage_is_reported_and_the_checkpoint_before_is_taken(saved, one, tmp_path):
    found = one.run(search, copies(saved, tmp_path, {"none": lambda root: None, **DAMAGED}))[0]
    assert found.pop("none") == (NEWEST, "")
    assert {case: name for case, (name, _) in found.items()} == dict.fromkeys(DAMAGED, OLDER)
    untold = [case for case, (_, printed) in found.items() if f"{NEWEST} is damaged: " not in printed]
    assert untold == []


def test_without_a_whole_checkpoint_the_run_is_refused_with_a_way_out(saved, one, tmp_path):
    def both(root):
        for step in (OLDER, NEWEST):
            (root / step / "SHA256SUMS").write_bytes(b"")

    def removed(root):
        for step in (OLDER, NEWEST):
            shutil.rmtree(root / step)

    found = one.run(search, copies(saved, tmp_path, {"both": both, "removed": removed}))[0]
    for name, printed in found.values():
        assert name == "refused" and "is whole: restore one of them, choose another output_dir, or delete " in printed


def tracker(content):
    return lambda root: (root / "latest").write_bytes(content)


def tracker_as(make):
    def damage(root):
        (root / "latest").unlink()
        make(root / "latest")

    return damage


TRACKERS = {
    "empty": tracker(b""),
    "cut": tracker(NEWEST.encode()[:-3]),
    "garbage": tracker(os.urandom(200)),
    "zeros": tracker(bytes(13)),
    "no UTF-8": tracker(b"\xff\xfe" + NEWEST.encode()),
    "absent": tracker(b"step_00000099"),
    "absolute": tracker(b"/etc"),
    "parent": tracker(b"../checkpoints/" + OLDER.encode()),
    "here": tracker(b"."),
    "two lines": tracker(f"{OLDER}\n{NEWEST}\n".encode()),
    "a name too long": tracker(OLDER.encode() * 1000),
    "a directory": tracker_as(Path.mkdir),
    "a link to a checkpoint": tracker_as(lambda path: path.symlink_to(OLDER)),
    "a dangling link": tracker_as(lambda path: path.symlink_to("nowhere")),
    "a pipe": tracker_as(os.mkfifo),
    "missing": tracker_as(lambda path: None),
}


def test_a_tracker_that_cannot_be_followed_is_reported_and_the_newest_checkpoint_is_taken(saved, one, tmp_path):
    found = one.run(search, copies(saved, tmp_path, TRACKERS))[0]
    assert {case: name for case, (name, _) in found.items()} == dict.fromkeys(TRACKERS, NEWEST)
    used = [
        printed.endswith("using the newest whole checkpoint\n") and "/latest " in printed
        for _, printed in found.values()
    ]
    assert all(used), found


def test_a_tracker_decides_where_it_names_a_checkpoint(saved, one, tmp_path):
    good = {"as written": tracker(OLDER.encode()), "by an editor": tracker(f"{OLDER}\n".encode())}
    found = one.run(search, copies(saved, tmp_path, good))[0]
    assert found == dict.fromkeys(good, (OLDER, ""))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff")])
def test_a_run_writes_a_new_tracker_and_an_export_does_without(inputs, saved, one, tmp_path, make):
    output = shutil.copytree(saved, tmp_path / "run")
    tracker_as(make)(output / "checkpoints")
    one.run(exported, inputs, output, tmp_path)
    printed = one.run(train, inputs, output)[0]
    assert f"{NEWEST} at step 4 of 8" in printed and metrics(output)[-1]["step"] == 8
    assert (output / "checkpoints" / "latest").read_text() == "step_00000008"


def test_all_of_a_checkpoint_is_on_the_disk_before_the_tracker_names_it(inputs, one, tmp_path):
    synced, renamed = one.run(synced_files, inputs, tmp_path)[0]
    moved, named = renamed.index(NEWEST), renamed.index("latest")
    checkpoint = tmp_path / "checkpoints" / NEWEST
    names = {path.name for path in checkpoint.iterdir()} - {"SHA256SUMS"} | {"SHA256SUMS.partial", f"{NEWEST}.partial"}
    assert [name for name in names if not any(order <= moved for order in synced[name])] == []
    for name in ("checkpoints", "latest.partial"):
        assert any(moved < order <= named for order in synced[name]), name


def synced_files(inputs, output):
    """Return {file or directory: number of renames before each fsync of it}, and the renames of a run with one save."""
    fsync, replace, rename = os.fsync, os.replace, Path.rename
    synced, renamed = defaultdict(list), []

    def noting(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name].append(len(renamed))
        fsync(descriptor)

    def replacing(source, target):
        renamed.append(Path(target).name)
        replace(source, target)

    def renaming(source, target):
        renamed.append(Path(target).name)
        return rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noting)
        patch.setattr(os, "replace", replacing)
        patch.setattr(Path, "rename", renaming)
        train(inputs, output, {"training.steps": 4, "checkpoint.save_interval": 4, "checkpoint.async_save": False})
    return synced, renamed


def resumed(inputs, run, root):
    train(inputs, run)


def started(inputs, run, root):
    train(inputs, root / "out", {"student.checkpoint": str(run)})


def taught(inputs, run, root):
    train(inputs, root / "out", {"teacher.checkpoint": str(run)})


def exported(inputs, run, root):
    from distill_nemo.checkpoint.export import export

    export(ExportConfig(str(run), str(root / "hf")))


def evaluated(inputs, run, root):
    from distill_nemo.training.evaluate import evaluate_student

    evaluate_student(StudentConfig(str(run)), str(inputs / "valid"), None, 32, 8)


def planned(inputs, run, root):
    from distill_nemo.models.resolve import resolve

    resolve(StudentConfig(str(run)))


EMBEDDING, MOMENTS = "model.embedding", "optimizer.state.exp_avg"
READ = {  # file -> ways to read it, each of which must refuse it
    "random_state": (resumed,),
    "common_state": (resumed,),
    EMBEDDING: (resumed, started, taught, exported, evaluated),
    MOMENTS: (resumed,),
}


def refusals(inputs, run, root, roads):
    """Return {way: refusal} of those that refused."""
    printed = {}
    for road in roads:
        shutil.rmtree(root / "out", ignore_errors=True)
        try:
            road(inputs, run, root)
        except ValueError as error:
            printed[road.__name__] = str(error)
    return printed


@pytest.mark.parametrize("place", READ)
def test_an_object_that_would_run_code_is_refused_on_every_road(inputs, saved, one, tmp_path, place):
    run, executed = shutil.copytree(saved, tmp_path / "run"), tmp_path / "executed"
    shutil.rmtree(run / "checkpoints" / OLDER)
    plant(run / "checkpoints" / NEWEST, place, executed)
    write_sums(run / "checkpoints" / NEWEST)
    printed = one.run(refusals, inputs, run, tmp_path, (*READ[place], planned))[0]
    assert not executed.exists()
    assert printed.keys() == {road.__name__ for road in READ[place]}, printed


def test_a_common_pt_of_another_version_is_read_as_weights_only(inputs, saved, one, tmp_path):
    run, executed = shutil.copytree(saved, tmp_path / "run"), tmp_path / "executed"
    torch.save({"rng_layout": Runs(executed)}, run / "checkpoints" / NEWEST / "common.pt")
    with pytest.raises(ValueError, match=r"is not loaded: an object in it names \w+\.system, which could run code"):
        one.run(allowing_pickles, inputs, run)
    assert not executed.exists()


def allowing_pickles(inputs, run):
    """Resume with an environment that asks torch to unpickle everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        try:
            train(inputs, run)
        finally:
            assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
            assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_random_state_of_the_first_release_is_left_out_and_reported(inputs, saved, one, tmp_path):
    """It was a pickle named `rng`. No supported model draws random numbers after its first step."""
    run, executed = shutil.copytree(saved, tmp_path / "run"), tmp_path / "executed"
    checkpoint = run / "checkpoints" / NEWEST
    contents = (checkpoint / ".metadata").read_bytes()
    stored = pickle.loads(contents)
    name = next(name for name in stored.state_dict_metadata if name.startswith("random_state/"))
    older = name.replace("random_state/", "rng/")
    stored.state_dict_metadata[older] = stored.state_dict_metadata.pop(name)
    for index in [index for index in stored.storage_data if index.fqn == name]:
        stored.storage_data[type(index)(older)] = stored.storage_data.pop(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(stored))
    plant(checkpoint, "rng/", executed)
    write_sums(checkpoint)
    printed = one.run(train, inputs, run)[0]
    assert "step_00000004 is of an older version and holds its random state as a pickle, which is not read" in printed
    one.run(train, inputs, tmp_path / "whole")
    assert metrics(run) == metrics(tmp_path / "whole") and not executed.exists()

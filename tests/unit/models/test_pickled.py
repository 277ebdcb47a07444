"""`nemo distill convert`: pickled weights become safetensors if the user allows it, and even then run no code."""

import hashlib
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.models.checkpoints.hf_tensors import stored_tensors
from distill_nemo.models.checkpoints.pickled import convert
from distill_nemo.models.checkpoints.write_safetensors import METADATA
from distill_nemo.runtime import output_lock
from tests.distributed.checkpoint.test_no_space import file_size_limit
from tests.hub_downloads import Hub, asked
from tests.tiny_models import write_hf


@pytest.fixture
def old(tmp_path):
    """Write a checkpoint of the old format."""
    path = tmp_path / "old"
    write_hf(path, "llama", layers=1)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").rename(tmp_path / "expected")
    return path


def test_converted_tensors_are_those_of_the_pickle(old, tmp_path):
    convert(str(old), str(tmp_path / "new"), allow_pickle=True)
    converted, expected = load_file(tmp_path / "new" / "model.safetensors"), load_file(tmp_path / "expected")
    assert converted.keys() == expected.keys() and all(
        torch.equal(converted[name], expected[name]) for name in expected
    )
    assert (tmp_path / "new" / "config.json").is_file() and not list(tmp_path.glob("*.partial"))


def test_a_name_on_the_hub_is_downloaded_if_pickles_are_allowed(old, tmp_path, capsys):
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    unread = {"training_args.bin": b"another pickle", "onnx/pytorch_model.bin": b"for another program"}
    with Hub() as hub, asked(hub.url, tmp_path / "home"):
        commit = hub.commit("org/old", files | unread)
        with pytest.raises(ValueError, match=r"the weights in org/old are pickles, .* add allow_pickle=true"):
            convert("org/old", str(tmp_path / "new"))
        assert hub.requests == []
        convert("org/old", str(tmp_path / "new"), allow_pickle=True)
        assert hub.strange == [] and f"converted org/old@{commit} to {tmp_path}/new" in capsys.readouterr().out
        assert sum("blobs=" in each for each in hub.requests) == 1, "the repository is listed once"
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in (files | unread).items()}
        assert [name for name in digests if digests[name] in hub.served] == ["pytorch_model.bin"]
        both = files | {"model.safetensors": (tmp_path / "expected").read_bytes()}
        hub.served.clear()
        for name, content in (("org/both", both), ("org/shards", files | {"model.safetensors.index.json": b"{}"})):
            hub.commit(name, content)
            with pytest.raises(ValueError, match=f"{name}@.* holds safetensors, which training reads as they are"):
                convert(name, str(tmp_path / "other"), allow_pickle=True)
        assert digests["pytorch_model.bin"] not in hub.served
        hub.commit("org/new", {"config.json": files["config.json"]})
        with pytest.raises(ValueError, match="there is nothing to convert"):
            convert("org/new", str(tmp_path / "other"), allow_pickle=True)
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(tmp_path / "expected").keys()


def test_safetensors_that_are_not_the_model_leave_the_pickles_to_be_converted(old, tmp_path):
    save_file({"x": torch.ones(1)}, old / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"neither model.safetensors nor .* convert checkpoint={old} output=NEW"):
        stored_tensors(old)
    convert(str(old), str(tmp_path / "new"), allow_pickle=True)
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(tmp_path / "expected").keys()


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def malicious(path):
    with (path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Runs(), file)


def incomplete(path):
    tensors = torch.load(path / "pytorch_model.bin")
    del tensors["model.norm.weight"]
    torch.save(tensors, path / "pytorch_model.bin")


def earlier_export(path):
    path.with_name("new").mkdir()
    save_file({"x": torch.ones(1)}, path.with_name("new") / "model.safetensors", METADATA)


@pytest.mark.parametrize(
    ("change", "allow", "message"),
    [
        (lambda path: None, False, "can run code when they are opened: add allow_pickle=true if you trust"),
        (malicious, True, "was not opened"),
        (lambda path: (path / "pytorch_model.bin").write_bytes(b""), True, "was not opened"),
        (incomplete, True, "does not fit its config.json: missing keys: model.norm.weight"),
        (lambda path: (path / "pytorch_model.bin").unlink(), True, "nothing to convert"),
        (lambda path: write_hf(path, "llama", layers=1), True, "holds safetensors, which training reads as they are"),
        (earlier_export, True, "exists and is not empty"),
        (lambda path: path.with_name("new").mkdir() or path.with_name("new").joinpath("x").touch(), True, "exists and"),
    ],
)
def test_pickles_that_cannot_be_converted_are_refused(old, tmp_path, monkeypatch, change, allow, message):
    monkeypatch.chdir(tmp_path)
    change(old)
    with pytest.raises(ValueError, match=message):
        convert(str(old), str(tmp_path / "new"), allow)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new" / "config.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_nothing(old, tmp_path):
    before = sorted(tmp_path.iterdir())
    size = (old / "pytorch_model.bin").stat().st_size
    with file_size_limit(size // 2), pytest.raises(OSError, match=rf"output = {tmp_path}/sub/new cannot be written: "):
        convert(str(old), str(tmp_path / "sub" / "new"), allow_pickle=True)
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_process_is_refused(old, tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 0.0)
    holder = "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
    holder += "print('held', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path / ".new.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"output = {tmp_path}/new/: another process writes there"):
            convert(str(old), f"{tmp_path}/new/", allow_pickle=True)
        process.kill()
    assert not (tmp_path / "new").exists()

"""`nemo distill convert`: pickled weights become safetensors when the user says so, and cannot run code even then."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.models.huggingface import METADATA
from distill_nemo.models.pickled import convert
from tests.tiny_models import write_hf


@pytest.fixture
def old(tmp_path):
    """A checkpoint as they were."""
    path = tmp_path / "old"
    write_hf(path, "llama", layers=1)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").rename(tmp_path / "expected")
    return path


def test_the_same_tensors(old, tmp_path):
    convert(str(old), str(tmp_path / "new"), allow_pickle=True)
    converted, expected = load_file(tmp_path / "new" / "model.safetensors"), load_file(tmp_path / "expected")
    assert converted.keys() == expected.keys() and all(
        torch.equal(converted[name], expected[name]) for name in expected
    )
    assert (tmp_path / "new" / "config.json").is_file() and not list(tmp_path.glob("*.partial"))


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
    ("change", "allow", "said"),
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
def test_refused(old, tmp_path, monkeypatch, change, allow, said):
    monkeypatch.chdir(tmp_path)
    change(old)
    with pytest.raises(ValueError, match=said):
        convert(str(old), str(tmp_path / "new"), allow)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new" / "config.json").exists()
    assert not list(tmp_path.glob("*.partial"))

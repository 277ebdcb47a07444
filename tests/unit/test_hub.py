"""Names on the Hugging Face Hub in place of directories, against a double of its API on loopback."""

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version

from distill_nemo.hub import HubName, cached, description_of, directory_of, hub_name, recorded_name
from tests.hub_downloads import Hub, asked

INDEX = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
WEIGHTS = {"model-1-of-2.safetensors": b"1" * 1000, "model-2-of-2.safetensors": b"2" * 3000}
READ = {
    "config.json": b'{"model_type": "llama"}',
    "hf_quant_config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "tokenizer.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
    "LICENSE": b"Apache",
    "NOTICE.txt": b"by us",
    "USE_POLICY.md": b"no harm",
}
UNREAD = {
    "modeling_own.py": b"raise SystemExit",
    "tokenizer_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"once more",
    "onnx/model.safetensors": b"for another program",
    "picture.png": b"",
}


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub, asked(hub.url, tmp_path):
        yield hub
    assert hub.strange == []


def model(hub, **options):
    return hub.commit("org/Model-1.7B", {**READ, **WEIGHTS, **UNREAD}, **options)


def downloads(hub):
    """Return requests for files. Before version 1.0, huggingface_hub asks for a commit also where the cache has it."""
    return [each for each in hub.requests if "/revision/" not in each]


def test_a_name_is_no_path(tmp_path):
    (tmp_path / "runs" / "q").mkdir(parents=True)
    names = ("org/Model-1.7B", "o/n@v1.0", "o/n@refs/pr/3", "runs/nothing")
    assert [hub_name(name, tmp_path) for name in names] == [HubName(*each.split("@")) for each in names]
    paths = ("runs/q", "runs", "./runs/nothing", "/o/n", "o/n/m", "../n", "o/", "", "o/n@", "o/n@a b", "~/n")
    assert [path for path in paths if hub_name(path, tmp_path)] == []


def test_a_download_has_what_is_read_and_no_code_and_is_not_repeated(hub):
    commit = model(hub)
    directory = Path(directory_of("org/Model-1.7B"))
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}
    assert found | {"LICENSE": (directory / "LICENSE").read_bytes()} == READ | WEIGHTS
    assert recorded_name(str(directory)) == f"org/Model-1.7B@{commit}" and directory.name == commit
    hub.requests.clear()
    assert directory_of(f"org/Model-1.7B@{commit}") == str(directory)
    assert downloads(hub) == []


def test_a_name_in_a_record_is_a_directory_in_any_cache():
    commit = "0123456789" * 4
    assert recorded_name(f"/cache/models--a-b--c--d/snapshots/{commit}") == f"a-b/c--d@{commit}"
    for path in ("runs/q", f"/models--a--b/snapshots/{commit}/more", "/models--a--b/snapshots/main"):
        assert recorded_name(path) == path


def test_a_tokenizer_and_a_plan_take_no_weights(hub):
    model(hub)
    for directory in (directory_of("org/Model-1.7B", weights=False), description_of("org/Model-1.7B")):
        assert sorted(path.name for path in Path(directory).glob("*.json")) == sorted(x for x in READ if "json" in x)
    assert served_weights(hub) == 0


def test_after_an_interruption_a_plan_sees_no_half_of_the_weights_and_a_run_downloads_the_other(hub):
    from huggingface_hub import hf_hub_download

    commit = model(hub)
    hf_hub_download("org/Model-1.7B", "model-1-of-2.safetensors")
    assert served_weights(hub) == 1000
    assert list(Path(description_of("org/Model-1.7B")).glob("*.safetensors")) == []
    assert Path(description_of("org/Model-1.7B"), "config.json").is_file()
    assert Path(directory_of("org/Model-1.7B")).name == commit
    assert served_weights(hub) == 4000
    assert len(list(Path(description_of("org/Model-1.7B")).glob("*.safetensors"))) == 2


def served_weights(hub):
    return sum(size for name, size in hub.served.items() if len(name) == 64)  # their names are digests


def test_without_a_network_the_cache_knows_branches_and_files(hub, tmp_path):
    commit = model(hub)
    directory = directory_of("org/Model-1.7B")
    with asked("http://127.0.0.1:9", tmp_path):
        assert directory_of("org/Model-1.7B") == description_of(f"org/Model-1.7B@{commit}") == directory
        assert cached(f"org/Model-1.7B@{commit}") == directory
        assert cached("org/other") == "org/other"
    with asked(hub.url, tmp_path, HF_HUB_OFFLINE=True):
        hub.requests.clear()
        assert directory_of("org/Model-1.7B") == directory and downloads(hub) == []
        if Version(huggingface_hub.__version__) < Version("1"):
            return  # it takes a directory without some files for whole
        Path(directory, "model-2-of-2.safetensors").unlink()
        with pytest.raises(ValueError, match=r"not whole in the cache .*HF_HUB_OFFLINE"):
            directory_of("org/Model-1.7B")


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, tmp_path, monkeypatch):
    model(hub)
    directory = directory_of("org/Model-1.7B")
    monkeypatch.setattr("distill_nemo.hub.READ_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with asked(url, tmp_path):
            assert directory_of("org/Model-1.7B") == directory
        with asked(url, tmp_path / "other"), pytest.raises(ValueError, match=r"cannot be asked: .* hf download org/M"):
            directory_of("org/Model-1.7B")


def test_a_gated_model_needs_the_token_of_the_environment(hub, monkeypatch):
    model(hub, token="hf_right")
    with pytest.raises(ValueError, match=r"is gated: accept its terms at http://\S+/org/Model-1.7B, and set HF_TOKEN"):
        directory_of("org/Model-1.7B")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert Path(directory_of("org/Model-1.7B"), "config.json").is_file()


def test_refusals_say_what_to_do(hub, tmp_path, monkeypatch):
    model(hub)
    with pytest.raises(ValueError, match=r"runs/q7b: there is no such directory here, and no such model at http://"):
        directory_of("runs/q7b")
    with pytest.raises(ValueError, match="has no branch, tag or commit v2"):
        directory_of("org/Model-1.7B@v2")
    with asked("http://127.0.0.1:9", tmp_path / "other"), pytest.raises(ValueError, match="hf download org/Model"):
        directory_of("org/Model-1.7B")
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(10**4, 10**4 - 3999, 3999))
    with pytest.raises(ValueError, match=r"needs 0.00 GB, and .* has 0.00 GB free: free space, or set HF_HOME"):
        directory_of("org/Model-1.7B")
    assert served_weights(hub) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(10**4, 10**4 - 4000, 4000))
    assert len(list(Path(directory_of("org/Model-1.7B")).glob("*.safetensors"))) == 2

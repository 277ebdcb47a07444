"""A file is replaced as a whole or not at all."""

import os

import pytest

from distill_nemo.runtime.files import remove_directory, write_atomically


@pytest.mark.parametrize(("content", "bytes_"), [("ü\n", b"\xc3\xbc\n"), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_writes_text_and_bytes(tmp_path, content, bytes_):
    (tmp_path / "file").write_text("old")
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == bytes_ and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    def failing(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, fails, failing)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    order = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:
        monkeypatch.setattr(os, name, lambda *args, name=name: (order.append(name), real[name](*args)))
    write_atomically(tmp_path / "file", "new")
    assert order == ["fsync", "replace", "fsync"]


def test_of_a_link_to_a_directory_the_link_is_removed(tmp_path):
    (tmp_path / "disk" / "step").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for name in ("link", "disk/step", "absent"):
        remove_directory(tmp_path / name)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["disk"]

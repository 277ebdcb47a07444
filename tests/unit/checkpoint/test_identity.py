"""Recognise teacher and token files by their whole content, and read them again only after a change."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill_nemo.checkpoint import identity
from distill_nemo.checkpoint.directory import changes, check_resumable
from distill_nemo.checkpoint.identity import run_record
from distill_nemo.config import DataConfig, ParallelismConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.runtime import file_hashes
from tests.stores import manifest_of, write_store


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hash_files(paths, cache):
    """Hash files as a new process does, and write the cache."""
    identity._hashed.clear()
    hashes = identity.hash_files(paths, cache)
    identity._write_cache(cache, paths)
    return hashes


def write_safetensors(path, tensors, metadata=None, order=None, seed=0):
    """Write a file by hand: `order` is the order of the header's keys and, with `seed`, of the data."""
    names = list(tensors)
    random.Random(seed).shuffle(names) if seed else None
    header, data = {}, b""
    for name in names:
        kind, shape, content = tensors[name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header |= {"__metadata__": metadata} if metadata else {}
    text = json.dumps({name: header[name] for name in order or header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


TENSORS = {
    "a": ("F32", [2], b"12345678"),
    "b": ("F32", [1], b"abcd"),
    "none": ("F32", [0], b""),
    "c": ("I8", [3], b"xyz"),
}


def hashed(path):
    return file_hashes.join_hashes([file_hashes.hash_part(part) for part in file_hashes.parts(path)])


def test_the_order_of_a_safetensors_header_and_its_metadata_do_not_count(tmp_path):
    ways = [{}, {"metadata": {"format": "pt"}}, {"metadata": {"b": "1", "a": "2"}}, {"order": ["c", "none", "b", "a"]}]
    ways += [{"metadata": {"x": "y"}, "order": ["b", "__metadata__", "a", "c", "none"]}, {"seed": 1}, {"seed": 2}]
    for number, way in enumerate(ways):
        write_safetensors(tmp_path / f"{number}.safetensors", TENSORS, **way)
    assert len({hashed(path) for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "a": ("F32", [2], b"12345679")},
        {**TENSORS, "a": ("I32", [2], b"12345678")},
        {**TENSORS, "a": ("F32", [1, 2], b"12345678")},
        {**TENSORS, "a": TENSORS["b"], "b": TENSORS["a"]},
        {"renamed" if name == "a" else name: tensor for name, tensor in TENSORS.items()},
        {name: tensor for name, tensor in TENSORS.items() if name != "none"},
    ],
)
def test_a_tensor_that_differs_in_anything_is_another(tmp_path, other):
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    write_safetensors(tmp_path / "b.safetensors", other)
    assert hashed(tmp_path / "a.safetensors") != hashed(tmp_path / "b.safetensors")


DAMAGED = {
    "empty": lambda content: b"",
    "a header longer than the file": lambda content: b"\xff" * 8 + content[8:],
    "no JSON": lambda content: content.replace(b"dtype", b'dt"pe'),
    "a list": lambda content: struct.pack("<Q", 2) + b"[]",
    "without offsets": lambda content: content.replace(b"data_offsets", b"data_offsetz"),
    "bytes of no tensor": lambda content: content + b"more",
    "cut": lambda content: content[:-1],
    "deep": lambda content: struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_safetensors_file_is_hashed_as_it_lies(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, TENSORS)
    whole = hashed(path)
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    assert hashed(path) != whole and sum(part.length for part in file_hashes.parts(path)) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
@pytest.mark.parametrize("size", ["PART_BYTES", "BLOCK_BYTES"])
def test_every_byte_counts_however_the_file_is_divided(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(file_hashes, size, 7)
    path, content = tmp_path / name, os.urandom(50)
    write_safetensors(path, {"a": ("U8", [50], content)}) if name.endswith("s") else path.write_bytes(content)
    whole, seen = path.read_bytes(), set()
    for place in range(len(whole) - 50, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        seen.add(hashed(path))
    path.write_bytes(whole)
    assert len(seen | {hashed(path)}) == 51


@pytest.fixture
def reads(monkeypatch):
    """Return the names of the files that were read."""
    read, names = identity.hash_part, []
    monkeypatch.setattr(identity, "hash_part", lambda part: (names.append(part.path.name), read(part))[1])
    return names


def test_only_what_changed_is_read_again(tmp_path, alone, reads):
    files, cache = [tmp_path / name for name in ("a", "b")], tmp_path / "run" / identity.CACHE
    cache.parent.mkdir()
    for path in files:
        path.write_bytes(path.name.encode() * 100)
    first = hash_files(files, cache)
    assert reads == ["a", "b"] and hash_files(files, cache) == first and reads == ["a", "b"]
    os.utime(files[0])  # another mtime
    assert hash_files(files, cache) == first and reads == ["a", "b", "a"]
    stat = files[1].stat()
    (tmp_path / "c").write_bytes(bytes(100))
    os.utime(tmp_path / "c", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "c").rename(files[1])  # another inode of the same size and mtime
    assert hash_files(files, cache)[files[1]] != first[files[1]] and reads == ["a", "b", "a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "run"], "nothing lies beside the files"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"\xff\xfe", bytes(50), b"[" * 100_000, b'{"PATH": 1}', b'{"PATH": [1, 2, 3]}',
        b'{"PATH": [SIZE, MTIME, INODE, "no hash"]}', b'{"PATH": [SIZE, MTIME, INODE, 7]}',
        b'{"PATH": [SIZE, MTIME, INODE, null]}', b'{"PATH": ["SIZE", MTIME, INODE, "' + b"0" * 64 + b'"]}',
    ],
)  # fmt: skip
def test_a_damaged_memory_is_not_believed(tmp_path, alone, reads, content):
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_bytes(b"a")
    stat = path.stat()
    replaced = {b"PATH": str(path), b"SIZE": stat.st_size, b"MTIME": stat.st_mtime_ns, b"INODE": stat.st_ino}
    for name, value in replaced.items():
        content = content.replace(name, str(value).encode())
    cache.write_bytes(content)
    found = hash_files([path], cache)
    assert reads == ["a"] and hash_files([path], cache) == found and reads == ["a"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_memory_that_cannot_be_kept_is_done_without(tmp_path, alone, make):
    (tmp_path / "a").write_bytes(b"a")
    make(tmp_path / "cache")
    assert hash_files([tmp_path / "a"], tmp_path / "cache")


def record(root, output):
    """Return the recorded content of a run's files: a teacher of one file and one pair of token files."""
    config = RunConfig(str(output), StudentConfig(), TeacherConfig(str(root / "teacher")))
    config.data = DataConfig(["0.5", str(root / "train")], [])
    return run_record(config)["contents"]


def write_run_files(root):
    (root / "teacher").mkdir(parents=True)
    (root / "teacher" / "config.json").write_text("{}")
    write_safetensors(root / "teacher" / "model.safetensors", {"a": ("U8", [10**6], random.Random(0).randbytes(10**6))})
    for suffix in (".bin", ".idx"):
        (root / f"train{suffix}").write_bytes(random.Random(1).randbytes(10**6))


def test_what_samples_would_miss_is_another_content(tmp_path, alone):
    write_run_files(tmp_path)
    before = record(tmp_path, tmp_path)
    for name, field in (("teacher/model.safetensors", "teacher.checkpoint"), ("train.bin", "data.train")):
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        content[500_000] ^= 1
        path.write_bytes(content)
        now = record(tmp_path, tmp_path)
        assert [key for key in now if now[key] != before[key]] == [field]
        before = now


def test_moved_files_are_the_same(tmp_path, alone):
    for name in ("here", "there"):
        write_run_files(tmp_path / name)
    assert record(tmp_path / "here", tmp_path) == record(tmp_path / "there", tmp_path)


def test_a_student_is_known_by_its_weights_where_they_moved_and_by_its_path_where_they_changed(tmp_path, alone):
    def resumed(name):
        config = RunConfig(str(tmp_path / "run"), StudentConfig(checkpoint=str(tmp_path / name / "teacher")))
        check_resumable(json.loads(json.dumps(saved)), run_record(config), True)

    for name in ("here", "there", "other"):
        write_run_files(tmp_path / name)
    (tmp_path / "other" / "teacher" / "model.safetensors").write_bytes(b"others")
    saved = run_record(RunConfig(str(tmp_path / "run"), StudentConfig(checkpoint=str(tmp_path / "here" / "teacher"))))
    resumed("there")
    with pytest.raises(ValueError, match=r"student\.checkpoint: was '.*here/teacher', is '.*other/teacher'"):
        resumed("other")
    (tmp_path / "here" / "teacher" / "model.safetensors").write_bytes(b"trained further")
    resumed("here")


def shares(root, paths, part_bytes):
    """Return (hashes, bytes that this rank read) of two ranks."""
    from distill_nemo.runtime.process_groups import process_groups

    read = []
    with pytest.MonkeyPatch.context() as patch, process_groups(ParallelismConfig()):
        patch.setattr(file_hashes, "PART_BYTES", part_bytes)
        patch.setattr(identity, "hash_part", lambda part: (read.append(part.length), file_hashes.hash_part(part))[1])
        return identity.hash_files(paths, root / "cache"), sum(read)


def test_ranks_share_the_reading_and_agree(two, tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "PART_BYTES", 1000)
    sizes = {"large": 100_000, "small": 10, "empty": 0, "other": 50_000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    paths = [tmp_path / name for name in sizes]
    (first, mine), (second, others) = two.run(shares, tmp_path, paths, 1000)
    assert first == second == {path: hashed(path) for path in paths}
    assert mine + others == sum(sizes.values()) and abs(mine - others) <= 2000


def unreadable(root):
    from distill_nemo.runtime.process_groups import process_groups

    def failing(part):
        if part.path.name == "b":
            raise OSError(5, "Input/output error", str(part.path))
        return "0" * 64

    with pytest.MonkeyPatch.context() as patch, process_groups(ParallelismConfig()):
        patch.setattr(identity, "hash_part", failing)
        try:
            identity.hash_files([root / "a", root / "b"], root / "cache")
        except ValueError as error:
            return str(error)


def test_a_file_that_one_rank_cannot_read_is_named_by_all(two, tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(10))
    errors = two.run(unreadable, tmp_path)
    assert errors == [f"[Errno 5] Input/output error: '{tmp_path}/b'"] * 2


def test_a_teacher_saved_again_is_the_same(tmp_path, alone):
    """Every export writes the header's metadata in another order."""
    from safetensors.torch import save_file

    tensors = {f"layer.{i}": torch.full((3,), float(i)) for i in range(20)}
    metadata = {f"key{i}": str(i) for i in range(8)}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    write_run_files(tmp_path / "data")
    contents, headers = set(), set()
    for _ in range(8):
        save_file(tensors, tmp_path / "teacher" / "model.safetensors", metadata)
        headers.add((tmp_path / "teacher" / "model.safetensors").read_bytes())
        config = RunConfig(str(tmp_path), StudentConfig(), TeacherConfig(str(tmp_path / "teacher")))
        config.data = DataConfig([str(tmp_path / "data" / "train")], [])
        contents.add(run_record(config)["contents"]["teacher.checkpoint"])
    assert len(headers) > 1, "the header was the same each time: the test shows nothing"
    assert len(contents) == 1


def test_a_run_of_the_first_release_is_told_that_its_samples_come_in_another_order():
    record = {"optimizer": {"lr": 1e-3}, "training": {"steps": 4}, "contents": {}}
    assert changes(record, record) == []
    (line,) = changes({**record, "identity": {"data.train": "0f"}}, record)
    assert line.startswith("samples: in another order from here on")


def test_shards_of_a_store_must_have_their_sums(tmp_path, alone, reads):
    write_store(tmp_path / "store", manifest_of())
    sums = corpus_at(tmp_path / "store").sums
    for _ in range(2):
        identity.hash_files([], tmp_path / "cache", sums)
    assert reads == [path.name for path in sums], "read once"
    first, second, third = sums
    third.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"No such file .*{third}"):  # on rank 0, for which the others wait
        identity.hash_files([], tmp_path / "cache", sums)
    (tmp_path / "elsewhere").rename(third)
    (tmp_path / "store" / "aside").write_bytes(first.read_bytes())
    second.replace(first)
    (tmp_path / "store" / "aside").replace(second)
    with pytest.raises(ValueError, match=rf"damaged, by the sums in their manifest: {first}, {second}; write"):
        identity.hash_files([], tmp_path / "cache", sums)

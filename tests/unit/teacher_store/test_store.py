"""Stores read back what was written, and refuse what is damaged."""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from distill_nemo.runtime.checksums import sha256
from distill_nemo.teacher_store import reader
from distill_nemo.teacher_store import writer as writing
from distill_nemo.teacher_store.manifest import MANIFEST, OUTPUT_LAYER, shard_name
from distill_nemo.teacher_store.output_layer import OutputLayer
from distill_nemo.teacher_store.packing import pack_numbers, unpack_numbers
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import WrittenShards, claim_shard, create_store, finish_store
from tests.stores import V, manifest_of, random_window, write_store, write_windows

CASES = {
    "sampled": manifest_of(),
    "sampled, documents apart": manifest_of(documents_apart=True),
    "sampled at T=2": manifest_of(temperature=2.0),
    "sampled, more draws than ids": manifest_of(vocab_size=7),
    "sampled, 2**20 ids": manifest_of(vocab_size=2**20, num=50, num_windows=2),
    "top_k": manifest_of("top_k"),
    "top_k, a whole vocabulary": manifest_of("top_k", num=V),
    "top_k, 2**20 ids": manifest_of("top_k", vocab_size=2**20, num_windows=2),
    "hidden": manifest_of("hidden"),
    "hidden, bfloat16": manifest_of("hidden", dtype="bfloat16"),
}


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    write_store(path, manifest_of())
    return path


@pytest.mark.parametrize("case", CASES)
def test_every_window_is_read_as_it_was_written(case, tmp_path):
    windows = write_store(tmp_path / "store", CASES[case])
    store = TeacherStore(tmp_path / "store")
    store.check()
    assert len(store) == len(windows) == store.manifest.num_windows
    for number in reversed(range(len(store))):
        found = store.window(number)
        assert found.keys() == windows[number].keys()
        for name, array in windows[number].items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
        inputs = store.window(number, with_targets=False)
        assert inputs.keys() == found.keys() & {"tokens", "loss_mask", "document_starts"}
    assert store.num_tokens == sum(int(window["loss_mask"].sum()) for window in windows)


def test_shards_are_safetensors_that_other_programs_open(store):
    for shard in store.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            assert {"tokens", "entropy", "pairs", "tokens_bounds"} <= set(file.keys())
            assert file.get_tensor("entropy").shape[0] == file.get_tensor("tokens_bounds")[-1]
    facts = json.loads((store / MANIFEST).read_text())["shards"]
    assert [shard["sha256"] for shard in facts] == [sha256(store / shard_name(i)) for i in range(3)]
    assert sorted(path.name for path in store.iterdir()) == [MANIFEST, *(shard_name(i) for i in range(3))]


def test_numbers_keep_every_bit_in_as_few_bytes_as_they_need():
    for num_bytes in range(1, 6):
        values = np.array([0, 1, 255, 256 ** (num_bytes - 1), 256**num_bytes - 1], np.int64)
        packed = pack_numbers(values, num_bytes)
        assert packed.shape == (5, num_bytes) and np.array_equal(unpack_numbers(packed), values)


def test_a_token_costs_what_it_has(tmp_path):
    """17 bits of an id and 6 of a count take 3 bytes; the id of no draw is not stored."""
    manifest = manifest_of(vocab_size=131_072, num=50)
    write_store(tmp_path / "a", manifest)
    store = TeacherStore(tmp_path / "a")
    pairs = sum(int((store.window(i)["ids"] >= 0).sum()) for i in range(len(store)))
    assert sum(shard.pairs for shard in store.contents.shards) == pairs
    assert manifest.coding.columns["pairs"].row_bytes == 3
    assert max(int(store.window(i)["ids"].max()) for i in range(len(store))) > 65_536


def test_output_layers_are_read_by_rows(tmp_path):
    write_store(tmp_path / "store", manifest_of("hidden"))
    layer = OutputLayer(tmp_path / "store", manifest_of("hidden"))
    whole = layer.rows("weight", 0, V)
    assert whole.shape == (V, 8) and np.array_equal(layer.rows("weight", 100, 28), whole[100:128])
    (tmp_path / "store" / "output_layer.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"output_layer\.safetensors is truncated: 1 bytes"):
        OutputLayer(tmp_path / "store", manifest_of("hidden"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", np.full(17, V, np.int32), "holds the id 512, but the teacher has the ids 0 to 511"),
        ("top1", -1, "holds the id -1"),
        ("ids", V, "holds the id 512"),  # a padded slot that was drawn
        ("counts", 13, "holds a count that is not 1 to 12"),
        ("counts", 0, "holds a count that is not 1 to 12"),
        ("counts", 1, "holds counts of a token that do not sum to 12"),  # draws that were lost
        ("entropy", np.nan, "has entropy that is not finite"),
        ("entropy", None, "has no entropy"),
        ("label_logprob", np.zeros(3, np.float32), r"has label_logprob of float32 \[3\], needs float32"),
        ("loss_mask", np.ones(16, np.uint8), "needs float32 .16."),  # more tokens count than have targets
        ("ids", np.zeros((9, 12)), "has ids of float64"),
    ],
)
def test_windows_that_cannot_be_are_not_written(name, value, message, tmp_path):
    manifest = manifest_of()
    create_store(tmp_path / "store", manifest)
    window = random_window(manifest, 3)
    if value is None:
        del window[name]
    elif isinstance(value, np.ndarray):
        window[name] = value
    else:
        window[name].flat[0] = value
    writer = claim_shard(tmp_path / "store", manifest, 0)
    assert writer is not None
    with writer, pytest.raises(ValueError, match=rf"window 0 of .*store .*{message}"):
        writer.append(window)


@pytest.mark.parametrize("value", [np.nan, 0.5, 1e4])
def test_a_tail_that_is_no_probability_is_neither_written_nor_read(value, tmp_path):
    """`inspect` computes its exponential, which overflows from 710 on."""
    manifest, store = manifest_of("top_k"), tmp_path / "store"
    windows = write_store(store, manifest)
    spoilt = random_window(manifest, 0)
    spoilt["tail"][0] = value
    create_store(tmp_path / "other", manifest)
    writer = claim_shard(tmp_path / "other", manifest, 0)
    assert writer is not None
    with writer, pytest.raises(ValueError, match=r"window 0 of .*other holds a tail that is above 0, or not a number"):
        writer.append(spoilt)
    shard = store / shard_name(0)
    shard.write_bytes(shard.read_bytes().replace(windows[0]["tail"].tobytes(), spoilt["tail"].tobytes(), 1))
    with pytest.raises(ValueError, match=r"000000\.safetensors is damaged: window 0 holds a tail that is above 0"):
        TeacherStore(store).window(0)


def test_writing_goes_on_at_the_missing_shards_with_the_same_bytes(store, tmp_path):
    manifest, other = manifest_of(), tmp_path / "other"
    windows = [random_window(manifest, number) for number in range(10)]
    write_windows(other, manifest, windows, shards=[1])
    (other / "shard-000002.safetensors.partial").write_bytes(b"killed")
    (other / shard_name(0)).write_bytes(b"killed before its facts were written")
    assert WrittenShards(other, manifest).missing() == [0, 2] and not finish_store(other)
    with pytest.raises(ValueError, match="other is not complete; run the command that wrote it again"):
        TeacherStore(other)
    write_windows(other, manifest, windows, shards=[2, 0])
    assert finish_store(other) and finish_store(other) and WrittenShards(other, manifest).missing() == []
    assert claim_shard(other, manifest, 0) is None
    assert [(path.name, path.read_bytes()) for path in sorted(other.iterdir())] == [
        (path.name, path.read_bytes()) for path in sorted(store.iterdir())
    ]


def test_a_shard_of_another_size_than_its_facts_is_missing(tmp_path):
    manifest, store = manifest_of(), tmp_path / "store"
    windows = [random_window(manifest, number) for number in range(10)]
    write_windows(store, manifest, windows)
    whole = (store / shard_name(1)).read_bytes()
    for spoilt in (whole[:-1], whole + b"x"):
        (store / shard_name(1)).write_bytes(spoilt)
        assert WrittenShards(store, manifest).missing() == [1] and not finish_store(store)
    (store / shard_name(1)).unlink()
    assert WrittenShards(store, manifest).missing() == [1] and not finish_store(store)
    write_windows(store, manifest, windows)
    assert (store / shard_name(1)).read_bytes() == whole and finish_store(store)


def test_files_have_the_mode_of_the_umask_at_every_moment(tmp_path):
    manifest, store = manifest_of("hidden"), tmp_path / "store"
    windows = [random_window(manifest, number) for number in range(10)]
    before = os.umask(0o027)
    try:
        create_store(store, manifest)
        assert [path.name for path in store.iterdir()] == [MANIFEST]
        for step in (lambda: write_windows(store, manifest, windows), lambda: finish_store(store)):
            step()
            assert {path.stat().st_mode & 0o777 for path in store.iterdir()} == {0o640}
    finally:
        os.umask(before)


def test_a_shard_that_another_writer_has_finished_meanwhile_stays(tmp_path, monkeypatch):
    """On a file system without locks, or one that shows new files late, both have claimed it."""
    manifest, store = manifest_of(), tmp_path / "store"
    windows = [random_window(manifest, number) for number in range(10)]
    write_windows(store, manifest, windows, shards=[])
    late = claim_shard(store, manifest, 0)
    assert late is not None
    writing._claimed.clear()
    write_windows(store, manifest, windows)
    before = (store / shard_name(0)).stat().st_mtime_ns
    for finished in (False, True):
        if finished:
            finish_store(store)
        with monkeypatch.context() as patch, late:
            patch.setattr(writing, "write_columns", None)
            if not late.num_appended:
                for number in late.windows:
                    late.append(windows[number])
            late.commit()
    assert (store / shard_name(0)).stat().st_mtime_ns == before
    assert not list(store.glob("*.json.*")) and len(list(store.glob("*.json"))) == 1


def test_another_store_is_not_written_over(store, tmp_path):
    create_store(store, replace(manifest_of(), versions={"torch": "3"}))
    for changed in ({"windows_per_shard": 5}, {"seed": 2}, {"teacher": {"weights": "abc"}}):
        with pytest.raises(ValueError, match=rf"store is another store:\n  {next(iter(changed))}: was .*, is "):
            create_store(store, replace(manifest_of(), **changed))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"full holds other files, such as \['thesis.txt'\]"):
        create_store(tmp_path / "full", manifest_of())
    with pytest.raises(ValueError, match=r"output = .*thesis\.txt cannot be made: File exists; choose another"):
        create_store(tmp_path / "full" / "thesis.txt", manifest_of())


CLAIM = """
import sys
from pathlib import Path
from distill_nemo.teacher_store.writer import claim_shard
from tests.stores import manifest_of
print(claim_shard(Path(sys.argv[1]), manifest_of(), 0) is not None)
"""


def test_a_shard_has_one_writer_at_a_time(tmp_path):
    manifest, store = manifest_of(), tmp_path / "store"
    create_store(store, manifest)

    def claimed_by_another_process():
        run = subprocess.run([sys.executable, "-c", CLAIM, str(store)], capture_output=True, text=True, check=True)
        return run.stdout.splitlines()[-1] == "True"

    writer = claim_shard(store, manifest, 0)
    assert writer is not None and claim_shard(store, manifest, 0) is None
    other = claim_shard(store, manifest, 1)
    assert other is not None and not claimed_by_another_process()
    other.close()
    writer.close()
    assert claimed_by_another_process() and claim_shard(store, manifest, 0) is not None


WRITE_AND_FINISH = """
import os, sys, time
from pathlib import Path
from tests.stores import manifest_of, random_window, write_windows
from distill_nemo.teacher_store.writer import finish_store
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.3), fsync(file))  # a file system that takes its time
store, manifest = Path(sys.argv[1]), manifest_of("hidden")
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
write_windows(store, manifest, [], [])
assert finish_store(store)
"""


def test_jobs_write_the_output_layer_and_finish_at_the_same_moment(tmp_path):
    """Both files are written aside under one name, which a second writer would truncate."""
    manifest, store, other = manifest_of("hidden"), tmp_path / "store", tmp_path / "other"
    write_store(other, manifest)
    write_windows(store, manifest, [random_window(manifest, number) for number in range(10)])
    (store / OUTPUT_LAYER).unlink()
    command = [sys.executable, "-c", WRITE_AND_FINISH, str(store), str(time.time() + 3)]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], errors
    assert {path.name: path.read_bytes() for path in store.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    manifest, store = manifest_of(), tmp_path / "store"
    windows = [random_window(manifest, number) for number in range(10)]
    write_windows(store, manifest, windows, shards=[0])
    before = sorted(path.name for path in store.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_windows(store, manifest, windows, shards=[1])
    assert sorted(path.name for path in store.iterdir()) == before
    write_windows(store, manifest, windows)
    assert finish_store(store)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_a_damaged_shard_is_named(store):
    shard = store / shard_name(1)
    whole, bounds = shard.read_bytes(), int.from_bytes(shard.read_bytes()[:8], "little") + 8
    damage = {
        "is truncated: .* bytes instead of": lambda: _truncate(shard),
        "is too long": lambda: shard.write_bytes(whole + b"x"),
        "header is not as its manifest says": lambda: _flip(shard, 20),
        "the bounds of its windows do not part": lambda: _flip(shard, bounds + 9),
        "is missing": shard.unlink,
    }
    for message, spoil in damage.items():
        spoil()
        with pytest.raises(ValueError, match=rf"shard-000001\.safetensors .*{message}.*nemo distill teacher"):
            TeacherStore(store).check()
            TeacherStore(store).window(4)
        shard.write_bytes(whole)
    with safe_open(shard, "np") as file:
        mask = whole.rindex(file.get_tensor("loss_mask").tobytes())
    _flip(shard, mask)
    with pytest.raises(ValueError, match=r"shard-000001.* is damaged: window 0 has \d+ targets for \d+ tokens"):
        TeacherStore(store).window(4)


@pytest.mark.parametrize("axis", ["tokens", "pairs"])
@pytest.mark.parametrize(("place", "change"), [(0, 1), (-1, -1)])
def test_bounds_begin_at_the_first_row_and_end_at_the_last(axis, place, change, store):
    """Rows before or after would belong to no window, and all windows would still have increasing bounds."""
    shard = store / shard_name(1)
    with safe_open(shard, "np") as file:
        bounds = file.get_tensor(f"{axis}_bounds")
    assert 1 < bounds[1] and bounds[-2] < bounds[-1] - 1
    spoilt = bounds.copy()
    spoilt[place] += change
    shard.write_bytes(shard.read_bytes().replace(bounds.tobytes(), spoilt.tobytes(), 1))
    with pytest.raises(ValueError, match=rf"the bounds of its windows do not part {bounds[-1]} {axis}"):
        TeacherStore(store).window(4)


def test_any_damaged_byte_is_an_error_or_other_numbers(store):
    """Nothing else is raised, and no memory is taken for sizes that a damaged file states."""
    shard = store / shard_name(2)
    whole = shard.read_bytes()
    for offset in range(0, len(whole), 7):
        _flip(shard, offset)
        try:
            opened = TeacherStore(store)
            for number in (8, 9):
                opened.window(number)
        except ValueError as error:
            assert "shard-000002.safetensors" in str(error)
        shard.write_bytes(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "zip"}, r'manifest\.codec = "zip" is not known'),
        ({"num_windows": 10**15}, "num_windows = 1000000000000000 is not from 1 to"),
        ({"vocab_size": -5}, "vocab_size = -5 is not from 1"),
        ({"windows_per_shard": 1}, "it lists 3 shards, needs 10"),
        ({"shards": 3}, "shards is not a list"),
        ({"shards": [{"sha256": "", "tokens": "many"}] * 3}, r"shards\[0\]\.tokens must be int"),
        ({"output_layer": "abc"}, "output_layer does not fit its codec"),
        ({"surprise": 1}, "surprise"),
        ({"format": 2}, "has the format 2, and 1 is read: write the store again with this"),
    ],
)
def test_a_damaged_manifest_is_refused(changes, message, store):
    path = store / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
        TeacherStore(store).check()


def test_a_shard_that_becomes_shorter_is_refused(store):
    opened = TeacherStore(store)
    opened.window(0)
    _truncate(store / shard_name(0))
    with pytest.raises(ValueError, match=r"shard-000000\.safetensors has \d+ bytes now, and had"):
        opened.window(0)


def test_the_manifest_is_read_once_however_many_shards_are_missing(tmp_path, monkeypatch):
    """It holds the vocabularies: 11 ms each time with 150,000 tokens, for tens of thousands of shards."""
    create_store(tmp_path / "store", manifest_of(windows_per_shard=1))
    reads, read = [], writing.read_store_manifest
    monkeypatch.setattr(writing, "read_store_manifest", lambda store: reads.append(store) or read(store))
    assert WrittenShards(tmp_path / "store", manifest_of(windows_per_shard=1)).missing() == list(range(10))
    assert len(reads) == 1


def test_looking_for_missing_shards_again_opens_the_new_ones_alone(tmp_path, monkeypatch):
    manifest, store = manifest_of(windows_per_shard=1), tmp_path / "store"
    windows = [random_window(manifest, number) for number in range(10)]
    write_windows(store, manifest, windows, shards=[0, 4])
    opened, facts = [], writing._written
    written = WrittenShards(store, manifest)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_written", lambda *args: opened.append(args[2]) or facts(*args))
        assert len(written.missing()) == 8 and opened == [0, 4]
    write_windows(store, manifest, windows, shards=[7])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_written", lambda *args: opened.append(args[2]) or facts(*args))
        assert len(written.missing()) == 7 and opened == [0, 4, 7]
    assert (written.num_windows, written.num_bytes) == (
        3,
        sum(path.stat().st_size for path in store.glob("*.safetensors")),
    )


def test_the_open_files_are_limited_over_all_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_open_shard", functools.lru_cache(3)(reader._open_shard.__wrapped__))
    for name in ("a", "b"):
        write_store(tmp_path / name, manifest_of())
    stores = [TeacherStore(tmp_path / name) for name in ("a", "b")]
    for number in range(10):
        for each in stores:
            each.window(number)
        there = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert sum(path.is_relative_to(tmp_path) for path in there) <= 3


def test_facts_of_a_shard_vanish_after_the_manifest_is_complete(store, monkeypatch):
    """A writer that looked for the facts just before they were removed does not write the shard again."""
    manifest = manifest_of()
    monkeypatch.setattr(writing, "_written", lambda *_: None)
    assert WrittenShards(store, manifest).missing() == [] and claim_shard(store, manifest, 1) is None

"""Output of `prepare`: one writer at a time, whole or absent, with finished parts kept when the disk is full."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distill_nemo.config import DataConfig
from distill_nemo.data import prepare as module
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.prepare import prepare
from distill_nemo.data.stdlib_corpus import train_tokenizer, write_stdlib_corpus
from distill_nemo.runtime.output_lock import OutputLock

LINES = "".join(f'{{"text": "document {i} of a few words"}}\n' for i in range(300))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text").write_text(LINES)
    train_tokenizer([directory / "text"], directory / "tokenizer", 300)
    return str(directory / "tokenizer")


@pytest.fixture
def source(tmp_path, monkeypatch) -> list[str]:
    """Return one input of several parts."""
    monkeypatch.setattr(module, "MIN_PART_BYTES", 2000)
    (tmp_path / "in.jsonl").write_text(LINES)
    return [str(tmp_path / "in.jsonl")]


def made(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextlib.contextmanager
def held_by_another(lock: Path):
    """Yield a process that holds a lock."""
    holder = "import sys\nfrom pathlib import Path\nfrom distill_nemo.runtime.output_lock import OutputLock\n"
    holder += "with OutputLock(Path(sys.argv[1]), 'output = X'):\n    print('held', flush=True)\n    sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(lock)]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # pyright: ignore
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process


def test_a_second_quickstart_is_refused_while_the_first_writes_its_corpus(tmp_path):
    with held_by_another(tmp_path / "data" / "corpus.lock") as process:
        message = rf"output = .*data: another process writes there \(process {process.pid} "
        with pytest.raises(ValueError, match=message):
            write_stdlib_corpus(str(tmp_path / "data"))
        assert names(tmp_path / "data") == ["corpus.lock"]


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, tokenizer, source):
    with held_by_another(tmp_path / "out.lock") as process:
        with pytest.raises(ValueError, match=rf"output = .*out: another process writes there \(process {process.pid} "):
            prepare(source, str(tmp_path / "out"), tokenizer, num_workers=1)
        assert names(tmp_path) == ["in.jsonl", "out.lock"]
        process.kill()
    assert prepare(source, str(tmp_path / "out"), tokenizer, num_workers=1).documents == 300
    assert names(tmp_path) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("full", ["000000.bin", "000003.bin", "000003.len", "joined.bin", "joined.idx"])
def test_a_full_disk_is_reported_and_what_is_whole_is_kept(tmp_path, tokenizer, source, capsys, full):
    output, parts = tmp_path / "out", tmp_path / "out.parts"
    parts.mkdir()
    (parts / full).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"output = .*out cannot be written: No space left on device"):
        prepare(source, str(output), tokenizer, num_workers=1)
    if full.startswith("000000"):
        assert names(tmp_path) == ["in.jsonl"]
    else:
        whole = [path for path in names(parts) if re.fullmatch(r"\d{6}\.json", path)]
        kept = [f"{path[:6]}.{suffix}" for path in whole for suffix in ("bin", "json", "len")]
        assert len(whole) >= 3 and names(parts) == [*kept, "tokenizer.json"]
        assert names(tmp_path) == ["in.jsonl", "out.parts"]
    prepare(source, str(output), tokenizer, num_workers=1)
    assert ("from an earlier, interrupted run" in capsys.readouterr().out) == (full != "000000.bin")
    prepare(source, str(tmp_path / "straight"), tokenizer, num_workers=1)
    assert made(output) == made(tmp_path / "straight")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"', '[{"text": 1}]'])
def test_a_refused_file_costs_no_part_that_is_whole(tmp_path, tokenizer, source, capsys, workers, content):
    output, inputs = tmp_path / "out", [*source, str(tmp_path / "z.json")]
    (tmp_path / "z.json").write_text(content)
    with pytest.raises(ValueError, match=r"z.json(.|\n)*\nThe parts that are whole are kept: run the same command"):
        prepare(inputs, str(output), tokenizer, num_workers=workers)
    assert names(tmp_path) == ["in.jsonl", "out.parts", "z.json"]
    assert len(list((tmp_path / "out.parts").glob("0*.json"))) == len(list((tmp_path / "out.parts").glob("0*.bin"))) > 2
    (tmp_path / "z.json").write_text('[{"text": "a"}]')
    assert prepare(inputs, str(output), tokenizer, num_workers=1).documents == 301
    assert "from an earlier, interrupted run" in capsys.readouterr().out
    prepare(inputs, str(tmp_path / "straight"), tokenizer, num_workers=1)
    assert made(output) == made(tmp_path / "straight")


def test_a_file_that_is_refused_alone_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "z.json").write_text('[{"text": "a"}, {"text": "b"')
    with pytest.raises(
        ValueError, match=r"z.json cannot be read: its JSON is broken or cut short after record 1"
    ) as error:
        prepare([str(tmp_path / "z.json")], str(tmp_path / "out"), tokenizer, num_workers=1)
    assert "kept" not in str(error.value) and names(tmp_path) == ["z.json"]


@pytest.mark.parametrize("shortened", [".bin", ".idx"])
def test_an_output_that_was_cut_short_is_made_again(tmp_path, tokenizer, source, shortened):
    output = tmp_path / "out"
    prepare(source, str(output), tokenizer, num_workers=1)
    before = made(output)
    Path(f"{output}{shortened}").write_bytes(b"")
    prepare(source, str(output), tokenizer, num_workers=1)
    assert made(output) == before


def test_parts_left_by_a_run_that_was_killed_at_its_very_end_are_removed(tmp_path, tokenizer, source, capsys):
    prepare(source, str(tmp_path / "out"), tokenizer, num_workers=1)
    (tmp_path / "out.parts").mkdir()
    prepare(source, str(tmp_path / "out"), tokenizer, num_workers=1)
    assert "nothing to do" in capsys.readouterr().out
    assert names(tmp_path) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_that_ends_while_it_publishes_leaves_nothing_that_can_be_read(
    tmp_path, tokenizer, source, monkeypatch, moved
):
    """Killed after `moved` of the three files; packs without their manifest would be other samples."""
    output, replace, published = tmp_path / "out", os.replace, []
    prepare(source, str(output), tokenizer, num_workers=1, pack=64)
    before = made(output)
    Path(f"{output}.bin").write_bytes(b"")

    def replace_some(old, new):
        if Path(new).stem == "out":
            if len(published) == moved:
                raise SystemExit
            published.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(SystemExit):
        prepare(source, str(output), tokenizer, num_workers=1, pack=64)
    monkeypatch.undo()
    data = DataConfig(train=[str(output)], sequence_length=64)
    with pytest.raises(ValueError, match=r"no file .*out\.idx"):
        check_corpora(data)
    monkeypatch.setattr(module, "MIN_PART_BYTES", 2000)
    prepare(source, str(output), tokenizer, num_workers=1, pack=64)
    check_corpora(data)
    assert made(output) == before


def test_a_whole_output_needs_no_right_to_write(tmp_path, tokenizer, source, capsys):
    (tmp_path / "data").mkdir()
    prepare(source, str(tmp_path / "data" / "out"), tokenizer, num_workers=1)
    with OutputLock(tmp_path / "data" / "out.lock", "output = X"):
        prepare(source, str(tmp_path / "data" / "out"), tokenizer, num_workers=1)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("data/", 'output = "data/" is a directory: add the name of the files, as in data/corpus'),
        ("", 'output = "" is a directory'),
        (".", 'output = "." is a directory'),
        ("data/..", r'output = "data/\.\." is a directory'),
        ("data/corpus.bin", 'output = "data/corpus.bin" must be without .bin'),
        ("corpus.idx", 'output = "corpus.idx" must be without .idx'),
        ("file/corpus", "output = file/corpus: .*cannot be written: "),
    ],
)
def test_an_output_that_is_no_prefix_is_refused(tmp_path, tokenizer, source, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        prepare(source, output, tokenizer, num_workers=1)
    assert names(tmp_path) == ["file", "in.jsonl"]


def test_an_output_inside_its_inputs_is_no_input(tmp_path, tokenizer, source):
    first = prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, num_workers=1)
    again = prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, num_workers=1)
    assert again.documents == first.documents == 300
    (tmp_path / "out.bin").write_bytes(b"")
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "000000.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, num_workers=1)
    assert prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, num_workers=1).documents == 300


@pytest.mark.parametrize("limit", [500, 3000])
def test_a_full_disk_at_the_first_files_is_an_error_of_the_disk(tmp_path, inputs, limit):
    """The tokenizer for the workers is larger than these limits."""
    (tmp_path / "a.txt").write_text("some text")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(inputs / "tokenizer"), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(inputs / "tokenizer"), progress=False)
    assert (tmp_path / "out.bin").is_file()

"""`prepare` and its readers, on real text with a real tokenizer in real processes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from distill_nemo.data import prepare as module
from distill_nemo.data.manifest import vocabulary
from distill_nemo.data.prepare import prepare
from distill_nemo.data.progress import reporter
from distill_nemo.data.readers import Schema, cut, read

STDLIB = Path(os.__file__).parent
SOURCES = sorted((STDLIB / "json").glob("*.py")) + sorted((STDLIB / "email").glob("*.py"))


TEXT = Schema("text", "text")


def train_tokenizer(directory: Path, eos: str | None) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[eos] if eos else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in SOURCES[:4]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<|endoftext|>")


def load(prefix: Path) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [np.array(tokens) for tokens in IndexedDataset(str(prefix))]


def texts() -> list[str]:
    return [path.read_text() for path in SOURCES if path.read_text()]


def write_jsonl(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def same_files(a: Path, b: Path) -> bool:
    return all(Path(f"{a}{x}").read_bytes() == Path(f"{b}{x}").read_bytes() for x in (".bin", ".idx"))


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_text_jsonl_and_parquet_agree_with_transformers(tmp_path: Path, tokenizer: str, monkeypatch):
    monkeypatch.setattr(module, "MIN_PART_BYTES", 50_000)
    inputs = {
        "text": [str(path) for path in SOURCES],
        "jsonl": [str(write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": text} for text in texts()]))],
        "parquet": [str(tmp_path / "a.parquet")],
    }
    pq.write_table(pa.table({"text": texts()}), tmp_path / "a.parquet", row_group_size=3)
    results = {kind: prepare(files, str(tmp_path / kind), tokenizer, num_workers=1) for kind, files in inputs.items()}
    assert same_files(tmp_path / "text", tmp_path / "jsonl")
    assert same_files(tmp_path / "text", tmp_path / "parquet")

    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    expected = [[*reference(text)["input_ids"], reference.eos_token_id] for text in texts()]
    made = load(tmp_path / "text")
    assert [tokens.tolist() for tokens in made] == expected
    assert made[0].dtype == np.uint16
    manifest = json.loads((tmp_path / "text.json").read_text())
    assert manifest["vocab_size"] == 600 and manifest["eod_id"] == reference.eos_token_id
    occurring = sorted({i for ids in expected for i in ids})
    assert manifest["max_token_id"] == max(occurring)
    assert vocabulary(manifest) == dict(zip(occurring, reference.convert_ids_to_tokens(occurring), strict=True))
    for result in results.values():
        assert (result.documents, result.tokens) == (len(expected), sum(map(len, expected)))


def test_index_is_what_megatrons_builder_writes(tmp_path: Path, tokenizer: str):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prepare([str(path) for path in SOURCES[:5]], str(tmp_path / "a"), tokenizer, num_workers=1)
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=DType.optimal_dtype(600))
    for tokens in load(tmp_path / "a"):
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "b.idx"))
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, tokenizer: str, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts()])
    prepare([str(source)], str(tmp_path / "whole"), tokenizer, num_workers=1)
    monkeypatch.setattr(module, "MIN_PART_BYTES", 20_000)  # lines are longer and shorter than a part
    for workers in (1, 3):
        result = prepare([str(source)], str(tmp_path / f"w{workers}"), tokenizer, num_workers=workers)
        assert result.documents == len(texts())
        assert same_files(tmp_path / "whole", tmp_path / f"w{workers}")
    assert not list(tmp_path.glob("*.parts"))


def test_lines_of_bad_records_are_counted_in_one_pass_over_the_file(tmp_path: Path, monkeypatch):
    path, schema, sizes = tmp_path / "in.jsonl", Schema("text", "text"), []
    path.write_bytes(b"bad\n\n" * 5000)

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(len(block := super().read(size)))
            return block

    pieces = cut(path, schema, 1000)
    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(io.FileIO(path, mode)))
    places = [record.where() for piece in pieces for record in read(piece, schema)]
    assert places == [f"{path}:{line}" for line in range(1, 10000, 2)]
    assert sum(sizes) <= path.stat().st_size
    assert next(record.where() for record in read(pieces[1], schema)) == f"{path}:401"  # once more


def test_a_line_over_many_pieces_is_read_whole_once(tmp_path: Path, monkeypatch):
    path, schema, sizes = tmp_path / "in.jsonl", Schema("text", "text"), []
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a" * 5_000_000, "b")))

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1) -> bytes:
            sizes.append(len(line := super().readline(size)))
            return line

    pieces = cut(path, schema, 200_000)
    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(io.FileIO(path, mode)))
    assert [len(record.document) for piece in pieces for record in read(piece, schema)] == [5_000_000, 1]
    assert sum(sizes) < 3 * path.stat().st_size


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 1000])
def test_every_line_is_read_once_wherever_the_file_is_cut(tmp_path: Path, part_bytes: int):
    lines = [{"text": "é" * n} for n in range(12)]
    path = write_jsonl(tmp_path / "in.jsonl", [*lines, "", *lines])
    found = [record.document for piece in cut(path, TEXT, part_bytes) for record in read(piece, TEXT)]
    assert found == [line["text"] for line in lines + lines]


SCRIPT = """
import signal, sys
from distill_nemo.data import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
prepare.MIN_PART_BYTES = 20_000
if __name__ == "__main__":
    prepare.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], num_workers=2)
"""


COUNTING_SCRIPT = """
import sys
from distill_nemo.data import prepare
prepare.MIN_PART_BYTES = 20_000
print("imported", __name__)
prepare.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], num_workers=2)
print("torch" in sys.modules)
"""


def test_workers_do_not_import_the_program_and_nothing_imports_torch(tmp_path: Path, tokenizer: str):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts()])
    (tmp_path / "script.py").write_text(COUNTING_SCRIPT)
    arguments = [sys.executable, str(tmp_path / "script.py"), str(source), str(tmp_path / "out"), tokenizer]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert printed.count("imported") == 1, printed
    assert printed.splitlines()[-1] == "False", "torch was imported"


def kill(process: subprocess.Popen, workers: list[psutil.Process]) -> None:
    process.kill()


def ctrl_c(process: subprocess.Popen, workers: list[psutil.Process]) -> None:
    masks = re.findall(
        r"SigBlk:\s*(\w+)", "".join(Path(f"/proc/{worker.pid}/status").read_text() for worker in workers)
    )
    assert all(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks), "Ctrl-C would reach a worker"
    os.killpg(process.pid, signal.SIGINT)


def kill_a_worker(process: subprocess.Popen, workers: list[psutil.Process]) -> None:
    workers[0].kill()


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (kill, -signal.SIGKILL, ""),
        (ctrl_c, -signal.SIGINT, "KeyboardInterrupt"),
        (kill_a_worker, 1, "a tokenising process died (killed, perhaps for memory: lower num_workers)"),
    ],
)
def test_a_run_that_ends_is_resumed_to_the_same_bytes(tmp_path: Path, tokenizer, monkeypatch, capsys, end, code, told):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts() * 6])
    (tmp_path / "script.py").write_text(SCRIPT)
    output = tmp_path / "ended"
    arguments = [sys.executable, str(tmp_path / "script.py"), str(source), str(output), tokenizer]
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    parts = tmp_path / "ended.parts"
    while len(list(parts.glob("0*.json"))) < 3:
        assert process.poll() is None, "ended before three parts were made"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGSTOP)  # so that it does not end by itself
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
    end(process, workers)
    os.killpg(process.pid, signal.SIGCONT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == code and told in stderr and "SpawnProcess" not in stderr, stderr
    assert len(workers) == 2 and not psutil.wait_procs(children, timeout=10)[1], "a process outlived its parent"
    assert not Path(f"{output}.bin").exists()

    monkeypatch.setattr(module, "MIN_PART_BYTES", 20_000)
    victim = sorted(parts.glob("0*.json"))[0].with_suffix(".bin")  # a part cut short by the crash is made again
    victim.write_bytes(victim.read_bytes()[:-2])
    prepare([str(source)], str(output), tokenizer, num_workers=1)
    assert "from an earlier, interrupted run" in capsys.readouterr().out
    prepare([str(source)], str(tmp_path / "straight"), tokenizer, num_workers=1)
    assert same_files(output, tmp_path / "straight")


def test_rerun_does_nothing_and_changed_input_is_made_anew(tmp_path: Path, tokenizer: str, capsys):
    source, output = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("one two three")
    first = prepare([str(source)], str(output), tokenizer)
    stamp = Path(f"{output}.bin").stat().st_mtime_ns
    again = prepare([str(source)], str(output), tokenizer)
    assert "nothing to do" in capsys.readouterr().out
    assert (again.tokens, Path(f"{output}.bin").stat().st_mtime_ns) == (first.tokens, stamp)
    source.write_text("one two three four five six")
    assert prepare([str(source)], str(output), tokenizer).tokens > first.tokens
    assert leftovers(tmp_path) == ["a.txt", "out.bin", "out.idx", "out.json"]


BAD = [
    ('{"text": "fine"}', None),
    ('{"text": ', "cannot be read as JSON"),
    ('{"body": "x"}', 'no key "text"'),
    ('{"text": 7}', "int, not a string"),
    ("[1]", "list, not an object"),
    ('{"text": "\\ud800"}', "surrogate"),
]


def test_the_corpus_of_other_inputs_is_not_replaced(tmp_path: Path, tokenizer: str):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    output = str(tmp_path / "corpus")
    prepare([str(tmp_path / "a.txt")], output, tokenizer, num_workers=1)
    before = Path(f"{output}.bin").read_bytes()
    with pytest.raises(ValueError, match=r"holds 1 documents of other inputs \(.*a\.txt, \.\.\.\): move it, or choose"):
        prepare([str(tmp_path / "b.txt")], output, tokenizer, num_workers=1)
    assert Path(f"{output}.bin").read_bytes() == before
    with pytest.raises(ValueError, match="an input is empty"):
        prepare([""], output, tokenizer)


def test_bad_records_are_named_and_stop_the_job_past_the_limit(tmp_path: Path, tokenizer: str, monkeypatch, capsys):
    monkeypatch.setattr(module, "MIN_PART_BYTES", 30)  # so that line numbers must include lines of other parts
    source = tmp_path / "in.jsonl"
    source.write_bytes("".join(line + "\n" for line, _ in BAD).encode() + b'{"text": "\xff"}\n{"text": "last"}\n')
    with pytest.raises(ValueError, match=r"6 bad records, more than max_bad_records = 5") as error:
        prepare([str(source)], str(tmp_path / "out"), tokenizer, num_workers=1, max_bad_records=5)
    for number, (_, problem) in enumerate(BAD, start=1):
        assert problem is None or (f"{source}:{number} " in str(error.value) and problem in str(error.value))
    assert leftovers(tmp_path) == ["in.jsonl"]

    result = prepare([str(source)], str(tmp_path / "out"), tokenizer, num_workers=1, max_bad_records=6)
    assert (result.documents, result.bad_records) == (2, 6)
    assert f"{source}:2 cannot be read as JSON" in capsys.readouterr().out
    listed = json.loads((tmp_path / "out.json").read_text())["bad"]
    assert listed[-1] == [f"{source}:7", "is not UTF-8: byte 0xff, invalid start byte"]


def test_bad_text_and_parquet_are_named(tmp_path: Path, tokenizer: str):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "b.parquet", row_group_size=1)
    with pytest.raises(ValueError) as error:
        prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, max_bad_records=1, num_workers=1)
    assert f"{tmp_path}/a.txt:2 is not UTF-8" in str(error.value) and f"{tmp_path}/b.parquet:2 " in str(error.value)
    with pytest.raises(ValueError, match=r'no column "body"; it has text'):
        prepare([str(tmp_path / "b.parquet")], str(tmp_path / "out"), tokenizer, text_key="body")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read: Parquet magic bytes not found"):
        prepare([str(tmp_path / "c.parquet")], str(tmp_path / "out"), tokenizer)


def test_what_cannot_be_prepared_is_refused(tmp_path: Path, tokenizer: str):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "mine.bin").write_text("precious")
    without_eod = train_tokenizer(tmp_path / "plain", None)
    text, out = [str(tmp_path / "a.txt")], str(tmp_path / "out")
    with pytest.raises(ValueError, match="names no eos_token"):
        prepare(text, out, without_eod)
    with pytest.raises(ValueError, match="no such tokenizer directory"):
        prepare(text, out, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no document in .*empty\.txt has any text"):
        prepare([str(tmp_path / "empty.txt")], out, tokenizer)
    with pytest.raises(ValueError, match=r"mine\.bin exists and was not made by prepare"):
        prepare(text, str(tmp_path / "mine"), tokenizer)
    for name in ("num_workers", "max_bad_records"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            prepare(text, out, tokenizer, **{name: -1})
    assert leftovers(tmp_path) == ["a.txt", "empty.txt", "mine.bin", "plain"]
    assert prepare(text, out, without_eod, append_eod=False).documents == 1


def test_progress_is_a_line_every_ten_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 9.0, 11.0, 12.0])
    monkeypatch.setattr("distill_nemo.data.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with reporter(100, show=True) as report:
        for _ in range(3):
            report(25, 1, 50)
    assert capsys.readouterr().err == "tokenising 50%: 2 documents, 100 tokens, 9 tokens/s\n"

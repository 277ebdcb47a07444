"""Inputs of `prepare`, by suffix, compression, link and content: each is read, reported or refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from distill_nemo.data import json_values
from distill_nemo.data.inputs import find_files, split_inputs
from distill_nemo.data.readers import Schema, cut, read

DOCS = ["first document", "second one\nwith a line", 'third é中, "quoted"']
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in DOCS).encode()
ARRAY = json.dumps([{"id": 1, "text": text} for text in DOCS]).encode()


def pyarrow_compressed(codec: str):
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": pyarrow_compressed("zstd"),
    ".lz4": pyarrow_compressed("lz4"),
}


def tar(content: bytes) -> bytes:
    file, about = io.BytesIO(), tarfile.TarInfo("in.jsonl")
    about.size = len(content)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def separated(delimiter: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in DOCS]
    return "".join(f"{i}{delimiter}{text}\r\n" for i, text in [("id", "text"), *enumerate(quoted)]).encode()


def write(path: Path, content: bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(path: Path, kind: str) -> Path:
    docs = pa.table({"id": [1, 2, 3], "text": DOCS})
    if kind == "parquet":
        pq.write_table(docs, path, row_group_size=2)
    elif kind == "feather":
        pyarrow.feather.write_feather(docs, str(path))
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, docs.schema) as writer:
            writer.write_table(docs, max_chunksize=2)
    return path


def documents(*inputs: str | Path) -> list[str]:
    """Return the texts of the documents. A bad record raises ValueError, as with `max_bad_records = 0`."""
    records = [
        record
        for file in find_files([str(entry) for entry in inputs]).files.values()
        for piece in cut(file, Schema("text", "text"), 50)
        for record in read(piece, Schema("text", "text"))
    ]
    bad = [f"{record.where()} {record.problem}" for record in records if record.problem]
    if bad:
        raise ValueError("bad records: " + "; ".join(bad))
    return [record.document for record in records]


def reports(*inputs: str | Path) -> str:
    return "\n".join(find_files([str(entry) for entry in inputs]).lines())


RECORDS = [
    *((f"a{suffix}", LINES) for suffix in (".jsonl", ".jsonlines", ".jl", ".ndjson", ".json", ".JSONL", ".Json")),
    ("array.json", ARRAY),
    ("array.jsonl", ARRAY),
    ("pretty.json", json.dumps(json.loads(ARRAY), indent=2).encode()),
    ("objects.json", b"".join(json.dumps({"text": text}, indent=2).encode() for text in DOCS)),
    ("bom.json", b"\xef\xbb\xbf" + ARRAY),
    ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
    ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
    ("end.jsonl", LINES.rstrip()),
    ("a.csv", separated(",")),
    ("bom.CSV", b"\xef\xbb\xbf" + separated(",")),
    ("a.tsv", separated("\t")),
]


@pytest.mark.parametrize("compression", ["", *COMPRESS, ".GZ"])
@pytest.mark.parametrize(("name", "content"), RECORDS, ids=[name for name, _ in RECORDS])
def test_records_are_read_whatever_the_suffix_and_the_compression(tmp_path, name, content, compression):
    compress = COMPRESS.get(compression.lower(), bytes)
    assert documents(write(tmp_path / (name + compression), compress(content))) == DOCS


@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".py", ".TXT"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path, suffix, compression):
    content = COMPRESS.get(compression, bytes)(b"one\n\ntwo\n")
    assert documents(write(tmp_path / f"a{suffix}{compression}", content)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.parquet", "parquet"), ("a.PARQUET", "parquet"), ("a.snappy.parquet", "parquet"), ("a.arrow", "stream"),
     ("b.arrow", "feather"), ("a.feather", "feather")],
)  # fmt: skip
def test_tables_are_read(tmp_path, name, kind):
    assert documents(table(tmp_path / name, kind)) == DOCS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_of_several_members_are_read_to_the_end(tmp_path, suffix):
    compress = COMPRESS[suffix]
    assert documents(write(tmp_path / f"a.jsonl{suffix}", compress(LINES) + compress(LINES))) == DOCS * 2


REFUSED = [
    ("corpus", LINES, "no suffix. Known are .txt"),
    ("a.jsonl.part", LINES, 'unknown suffix ".part"'),
    ("a.html", b"<p>x</p>", 'unknown suffix ".html"'),
    ("a.gz", gzip.compress(LINES), 'unknown suffix ".gz"'),
    ("a.tar.gz", gzip.compress(LINES), 'unknown suffix ".tar.gz"'),
    ("a.parquet.gzip", b"PAR1", 'unknown suffix ".gzip"'),
    ("a.parquet.gz", gzip.compress(b"PAR1"), r".parquet.gz is not read: decompress it"),
    ("a.jsonl", gzip.compress(LINES), "it holds gzip"),
    ("a.txt", bz2.compress(LINES), "it holds bzip2"),
    ("a.json", lzma.compress(LINES), "it holds xz"),
    ("a.csv", COMPRESS[".zst"](LINES), "it holds Zstandard"),
    ("a.tsv", COMPRESS[".lz4"](LINES), "it holds lz4"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "it holds gzip"),
    ("a.md", b"PK\x03\x04rest", "it holds zip"),
    ("a.jsonl", tar(LINES), "it holds tar"),
    ("a.jsonl.gz", gzip.compress(tar(LINES)), "it holds tar"),
    *((name, LINES.decode().encode(code), "UTF-16|NUL") for name in ("a.jsonl", "a.txt", "a.csv", "a.json")
      for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    ("zeros.jsonl", bytes(100), "NUL bytes"),
    ("cr.jsonl", LINES.replace(b"\n", b"\r"), "its lines end in CR alone"),
    ("a.parquet", LINES, "cannot be read: .*[Pp]arquet"),
    ("a.arrow", LINES, "cannot be read"),
    ("empty.jsonl.gz", b"", "it is empty, which no whole .gz file is"),
    ("a.jsonl.gz", LINES, "cannot be read"),
    ("a.jsonl.xz", LINES, "cannot be read"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "it holds a pointer of Git LFS"),
    ("a.csv", b"id,body\n1,x\n", 'no column "text"; it has id, body'),
    ("a.csv", b"text,text\n1,x\n", 'more than one column "text"'),
    ("a.csv", b'id,text\n1,"open\n2,x\n', "line 2 is not valid CSV"),
    ("a.tsv", b'id\ttext\n1\t"a" b\n', "line 2 is not valid TSV"),
    ("a.json", b'[{"text": "a"}, {"text": "b"', "after record 1"),
    ("a.json", b'[{"text": "a"},]', "after record 1"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', 'after record 1: "," or "]" is missing'),
    ("a.json", b'[{"text": "a"}] {"text": "b"}', "after record 1: something follows the array"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "output"), REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_what_is_not_what_its_name_says_is_refused_by_name_and_counts_as_no_record(tmp_path, name, content, output):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^{path}.*{output}"):
        documents(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "arrow"])
def test_a_text_with_bytes_that_were_never_written_is_a_bad_record(tmp_path, kind):
    """Parquet and Arrow have no checksums by default, and zeros are valid UTF-8."""
    path, text = tmp_path / f"a.{kind}", "begins" + "x" * 8 + "ends"
    content = {"txt": text, "jsonl": json.dumps({"text": text}), "json": json.dumps([{"text": text}])}
    if kind in ("parquet", "arrow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.DOCS", ["first", text, "third"])
            table(path, kind)
    else:
        write(path, content.get(kind, f'text\n"{text}"\n').encode())
    assert any(text in document for document in documents(path))
    zeros = rb"\u0000" * 8 if "json" in kind else bytes(8)
    write(path, path.read_bytes().replace(b"x" * 8, zeros))
    with pytest.raises(ValueError, match=rf"bad records: {path}.* holds a run of zero bytes, as a damaged file does"):
        documents(path)


def test_a_zero_byte_may_be_a_part_of_a_text(tmp_path):
    assert documents(write(tmp_path / "a.jsonl", b'{"text": "a\\u0000b"}')) == ["a\0b"]


@pytest.mark.parametrize("missing", [1, 20, 200])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_archive_that_was_cut_short_is_refused(tmp_path, suffix, missing):
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(1000))
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](lines)[:-missing])
    with pytest.raises(ValueError, match=f"^{path} cannot be read: "):
        documents(path)


def test_an_arrow_stream_that_lost_its_last_batches_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as stream:
        for text in DOCS:
            whole = file.tell()
            stream.write(pa.record_batch({"text": [text]}))
    os.truncate(path, whole)  # between two batches, where pyarrow sees the end of the file
    with pytest.raises(ValueError, match=f"^{path} cannot be read: .*end mark is missing"):
        documents(path)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("second", ["whole", "header damaged"])
def test_every_stream_of_an_archive_is_read_or_refused(tmp_path, suffix, second):
    compress, lines = COMPRESS[suffix], LINES.splitlines(keepends=True)
    parts = [compress(line) for line in lines]
    if second != "whole":
        parts[1] = b"\xfe" + parts[1][1:]
    path = write(tmp_path / f"a.jsonl{suffix}", b"".join(parts))
    if second == "whole":
        assert documents(path) == DOCS
    else:
        with pytest.raises(ValueError, match=f"^{path} cannot be read: "):
            documents(path)


BAD_RECORDS = [
    ("a.json", b'[{"text": "a"}, {"body": "b"}]', ', record 2 has no key "text"'),
    ("a.json", b'[{"text": "a"}, 3]', ", record 2 is a int, not an object"),
    ("a.json", b'[{"text": "a\xff"}]', ', record 1 "text" is not UTF-8: byte 0xff'),
    ("a.json", b'[{"text": "\\ud800"}]', ', record 1 "text" holds half of a surrogate pair'),
    (
        "a.json",
        b'[{"text": "a"}, {"text": "b", "id": 1, "text": "c"}]',
        ', record 2 has the key "text" twice in one object',
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "meta": {"id": 1, "id": 2}}\n',
        ':2 has the key "id" twice in one object',
    ),
    ("a.csv", b'id,text\n1,"a\nb"\n\n2,x,y\n', ":5 has 3 fields, and the header 2"),
    ("a.csv", b"id,text\n1,caf\xe9\n", ':2 "text" is not UTF-8: byte 0xe9'),
    ("a.jsonl.gz", gzip.compress(LINES + b"\n3\n"), ":5 is a int, not an object"),
]


@pytest.mark.parametrize(("name", "content", "output"), BAD_RECORDS)
def test_a_bad_record_is_named(tmp_path, name, content, output):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        documents(path)
    assert str(error.value) == f"bad records: {path}{output}" or f"bad records: {path}{output} (" in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", []),
        ("[]", []),
        ("[1, 23,\n 456] ", [1, 23, 456]),
        ('["\u00e9\\"]", {}, null]', ['\u00e9"]', {}, None]),
        ('{"a": 1}\n{"b": [2]} 12 34', [{"a": 1}, {"b": [2]}, 12, 34]),
    ],
)
def test_json_values_do_not_depend_on_how_much_is_read_at_once(tmp_path, monkeypatch, chunk, text, expected):
    monkeypatch.setattr(json_values, "CHUNK_CHARACTERS", chunk)
    with write(tmp_path / "a.json", text.encode()).open(encoding="utf-8") as file:
        assert list(json_values.json_values(file)) == expected


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"content": "b", "role": "assistant"}
LAYOUTS = {
    "lines": ("jsonl", '{"text": "BIG"}\n{"text": "b"}\n'),
    "lines of lists": (
        "jsonl",
        f"{json.dumps([ASKED, ANSWERED])}\n{json.dumps([ASKED, ANSWERED])}".replace("b", "BIG", 1),
    ),
    "a list of messages": ("jsonl", json.dumps([ANSWERED, ASKED]).replace("b", "BIG", 1)),
    "a list of messages over lines": ("lists", json.dumps([ANSWERED, ASKED], indent=2).replace("b", "BIG", 1)),
    "an array in a line": ("json", '[{"text": "BIG"}, {"text": "b"}]'),
    "an array over lines": ("json", json.dumps([{"text": "BIG"}, {"text": "b"}], indent=2)),
    "an array of lists": ("json", json.dumps([[{"role": "user", "content": "BIG"}], [ASKED]])),
    "an array of mails": ("json", '[{"from": "a", "text": "BIG"}]'),
    "objects over lines": ("json", '{ "text": "BIG",\n "id": 1}\n{ "text": "b",\n "id": 2}\n'),
    "a broken line": ("jsonl", '{"text": "BIG\n{"text": "b"}\n'),
    "a line of brackets": ("jsonl", '{"text": ' + "[" * 200_000 + '\n{"text": "BIG"}\n'),
    "a line of digits": ("jsonl", '{"text": ' + "9" * 5000 + '}\n{"text": "BIG"}\n'),
    "a broken line of a list": ("jsonl", '[1]\n{"text": "BIG"}\n'),
}


@pytest.mark.parametrize("size", [1, 100, 10_000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_file_does_not_depend_on_the_size_of_its_first_record(monkeypatch, name, size):
    expected, text = LAYOUTS[name]
    monkeypatch.setattr(json_values, "HEAD_CHARACTERS", 200)
    assert json_values.json_layout(io.StringIO(text.replace("BIG", "x" * size), newline="")) == expected


def test_lines_that_end_in_cr_alone_are_refused_whatever_their_length():
    file = io.StringIO('{"text": "' + "x" * 100_000 + '"}\r{"text": "b"}\r', newline="")
    with pytest.raises(ValueError, match="its lines end in CR alone"):
        json_values.json_layout(file)


@pytest.mark.parametrize("broken", ['"b" 1', '"b": 1, "c": \n}', '"b": "\\x"', '"b": "\n"', '"b": tru'])
def test_broken_json_does_not_pull_the_rest_of_the_file_into_memory(monkeypatch, broken):
    monkeypatch.setattr(json_values, "CHUNK_CHARACTERS", 100)
    file = io.StringIO('[{"a": "' + "long " * 100 + '"}, {' + broken + "}, " + '{"a": 2}, ' * 10_000 + "]")
    with pytest.raises(ValueError, match="broken or cut short after record 1"):
        list(json_values.json_values(file))
    assert file.tell() < 2000


def test_splits_of_a_data_set_are_not_read_together(tmp_path):
    for split in ("test", "train"):
        write(tmp_path / "set" / split / "state.json", b"{}")
        table(tmp_path / "set" / split / "data-00000-of-00001.arrow", "arrow")
    write(tmp_path / "set" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    for entry in (tmp_path / "set", tmp_path, tmp_path / "s*"):
        with pytest.raises(
            ValueError, match=rf"set holds a .* DatasetDict of test, train: .* such as {tmp_path}/set/train"
        ):
            find_files([str(entry)])
    assert documents(tmp_path / "set" / "train") == DOCS


def test_inputs_are_files_directories_and_globs_in_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl", "d.txt", "data[1]/e.txt"):
        write(tmp_path / name)
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path)]).files.values()
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "b.txt", "a.md", "d.txt", "data[1]/e.txt", "sub/c.jsonl"
    ]  # fmt: skip
    for pattern, expected in {
        "*/*.jsonl": "sub/c.jsonl",
        "**/c.*": "sub/c.jsonl",
        "data[1]/*": "data[1]/e.txt",
    }.items():
        assert list(find_files([f"{tmp_path}/{pattern}"]).files.values()) == [tmp_path / expected]
    with pytest.raises(ValueError, match=r"no input found for .*/\*\.rst"):
        find_files([f"{tmp_path}/*.rst"])


def test_a_file_counts_once_however_it_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "c" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c" / "soft.jsonl").symlink_to("a.jsonl")
    os.link(file, tmp_path / "c" / "hard.jsonl")
    (tmp_path / "d").symlink_to("c")
    names = [file, "c/a.jsonl", "./c//a.jsonl", "c/../c/a.jsonl", "c/soft.jsonl", "c/hard.jsonl", "c", "d", "*/*.jsonl"]
    for name in names:
        assert documents(file, name) == documents(name, file) == DOCS
        assert "(the same file again, counted once): " in reports(file, name)
    assert documents(*names) == DOCS


def test_links_are_followed_without_loops(tmp_path):
    write(tmp_path / "real" / "b.jsonl")
    write(tmp_path / "c" / "a.jsonl")
    for name, target in {
        "more": "../real",
        "loop": ".",
        "again": "..",
        "x.jsonl": "nothing",
        "y.jsonl": "y.jsonl",
    }.items():
        (tmp_path / "c" / name).symlink_to(target)
    (tmp_path / "real" / "back").symlink_to("../c")
    assert documents(tmp_path / "c") == DOCS * 2
    assert documents(f"{tmp_path}/c/**/*.jsonl") == DOCS * 2
    output = reports(tmp_path / "c")
    assert f"skipped 2 (a link to nothing): {tmp_path}/c/x.jsonl, {tmp_path}/c/y.jsonl" in output
    assert "(a directory that was read already): " in output
    with pytest.raises(ValueError, match=f"^{tmp_path}/c/x.jsonl: a link to nothing"):
        documents(tmp_path / "c" / "x.jsonl")


SKIPPED = {
    "README.md": "about the text; to include it, name it as an input",
    "LICENSE.txt": "about the text; to include it, name it as an input",
    "sub/COPYING.txt.gz": "about the text; to include it, name it as an input",
    "LICENSE": "no suffix",
    "_SUCCESS": "no suffix",
    "a.bin": 'unknown suffix ".bin"',
    "a.tar.gz": 'unknown suffix ".tar.gz"',
    "a.jsonl.crdownload": 'unknown suffix ".crdownload"',
    "b.parquet.gz": ".parquet.gz is not read: decompress it",
    "dataset_info.json": "about the data",
    "cache-0123456789abcdef.arrow": "a cache of `datasets`; to include it, name it as an input",
    "cache-0123456789abcdef_00001_of_00004.arrow": "a cache of `datasets`; to include it, name it as an input",
    "a.json": "the manifest of token files",
    "._a.jsonl": "hidden",
    ".cache/x.jsonl": "hidden",
}


def test_what_is_left_out_of_a_directory_is_reported_with_the_reason(tmp_path):
    write(tmp_path / "data.jsonl")
    write(tmp_path / "license_plates.jsonl")
    for name in SKIPPED:
        write(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert documents(tmp_path) == DOCS * 2
    output = reports(tmp_path)
    for name, reason in {**SKIPPED, "pipe.jsonl": "a pipe, a socket or a device"}.items():
        named = tmp_path / name.replace("/x.jsonl", "")
        assert any(f"({reason}): " in line and f"{named}" in line for line in output.splitlines()), (name, output)
    assert documents(tmp_path / "README.md") == [LINES.decode()], "it was named"
    with pytest.raises(ValueError, match=f"^{tmp_path}/pipe.jsonl: a pipe, a socket or a device"):
        documents(tmp_path / "pipe.jsonl")


def test_a_directory_without_text_is_refused_with_what_was_skipped(tmp_path):
    write(tmp_path / "part-00000")
    with pytest.raises(
        ValueError, match=rf'no input found for "{tmp_path}"(?s:.*)skipped 1 \(no suffix\): .*part-00000'
    ):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a,b", ["a", "b"]),
        ("a, b", ["a", "b"]),
        (" a ,\n b/*.txt ", ["a", "b/*.txt"]),
        ("x, y.txt", ["x, y.txt"]),
        ("a b", ["a b"]),
    ],
)
def test_inputs_are_split_at_commas(tmp_path, monkeypatch, message, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x, y.txt").write_text("a name with a comma")
    assert split_inputs(message) == expected


@pytest.mark.parametrize("inputs", [[""], ["a.txt", " "], []])
def test_an_empty_input_is_refused(tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(write(tmp_path / "a.txt").parent)
    with pytest.raises(ValueError, match=r"an input is empty|no input given"):
        find_files(inputs)

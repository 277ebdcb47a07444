"""Checks of token files: blends, damage, and the ids that a manifest names."""

import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from distill_nemo.config import DataConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.prepare import prepare
from distill_nemo.data.stdlib_corpus import train_tokenizer
from distill_nemo.data.token_files import INDEX_HEADER, INTEGER_TYPES, check_vocabulary, parse_blend
from tests.token_files import write_documents, write_tokens

SIZES = [0, 1, 39, 41, 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1]  # in the place of 40 documents


def test_blends_are_prefixes_with_or_without_weights():
    assert parse_blend("data.train", ["a"]) == (["a"], None)
    assert parse_blend("data.train", ["a", "b"]) == (["a", "b"], None)
    assert parse_blend("data.train", ["30", "a", "0.5", "b"]) == (["a", "b"], [30.0, 0.5])
    for wrong in (
        [],
        ["30", "a", "b"],
        ["30", "a", "x", "b"],
        ["0", "a"],
        ["-1", "a"],
        ["nan", "a"],
        ["a", "3"],
        ["1e308", "a", "1e308", "b"],
    ):
        with pytest.raises(ValueError, match=r"data\.train"):
            parse_blend("data.train", wrong)


def test_types_of_ids_are_megatrons(tmp_path: Path):
    assert {code: np.dtype(DType.dtype_from_code(code)) for code in INTEGER_TYPES} == {
        code: np.dtype(kind) for code, kind in INTEGER_TYPES.items()
    }
    for kind in INTEGER_TYPES.values():
        check_corpora(DataConfig([write_documents(tmp_path / "a", [[1, 2], [], [3]], kind)]))


def test_token_files_whose_sizes_contradict_are_refused(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)])
    check_corpora(data)
    bin_, idx = tmp_path / "a.bin", tmp_path / "a.idx"
    whole_bin, whole_idx = bin_.read_bytes(), idx.read_bytes()
    damage = [
        (whole_bin[:-10], whole_idx, r"a\.bin is truncated: 3990 bytes instead of 4000"),
        (whole_bin + b"xx", whole_idx, r"a\.bin is too long: 4002 bytes instead of 4000"),
        (whole_bin[:10], whole_idx, r"a\.idx holds 40 documents, more than the 5 tokens of .*a\.bin"),
        (b"", whole_idx, r"a\.bin is empty"),
        (whole_bin, whole_idx[:-8], r"a\.idx is truncated"),
        (whole_bin, whole_idx[:20], r"a\.idx is not a Megatron index|a\.idx holds no documents"),
        (whole_bin, b"other" + whole_idx[5:], r"a\.idx is not a Megatron index"),
    ]
    for new_bin, new_idx, message in damage:
        bin_.write_bytes(new_bin)
        idx.write_bytes(new_idx)
        with pytest.raises(ValueError, match=message) as error:
            check_corpora(data)
        assert "nemo distill prepare" in str(error.value)
    bin_.unlink()
    idx.write_bytes(whole_idx)
    with pytest.raises(ValueError, match=r"data\.train: no file .*a\.bin"):
        check_corpora(data)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (0, [b"", b"MMIDIDX\x01\x00", b"\xff" * 9]),
        (1, [0, 2, 2**64 - 1]),
        (2, [0, 1, 4, 5, 6, 7, 9, 255]),
        (3, SIZES),
        (4, SIZES),
    ],
    ids=["magic", "version", "type", "documents", "bounds"],
)
def test_every_wrong_field_of_an_index_header_is_refused(tmp_path: Path, field: int, values: list):
    data, idx = DataConfig(train=[write_tokens(tmp_path / "a", 0)]), tmp_path / "a.idx"
    whole = idx.read_bytes()
    for value in values:
        head = list(INDEX_HEADER.unpack(whole[: INDEX_HEADER.size]))
        if head[field] == value:
            continue
        head[field] = value
        idx.write_bytes(INDEX_HEADER.pack(*head) + whole[INDEX_HEADER.size :])
        with pytest.raises(ValueError, match=r"data\.train: .*a\.(idx|bin) .*nemo distill prepare"):
            check_corpora(data)


@pytest.mark.parametrize("value", [-(2**31), -1, 0, 49, 51, 2**31 - 1])
@pytest.mark.parametrize("document", [0, 17, 39])
def test_a_wrong_length_or_start_of_a_document_is_refused(tmp_path: Path, document: int, value: int):
    data, idx = DataConfig(train=[write_tokens(tmp_path / "a", 0)]), tmp_path / "a.idx"
    whole = idx.read_bytes()
    starts_at = INDEX_HEADER.size + 40 * 4
    for kind, place in (("<i", INDEX_HEADER.size + document * 4), ("<q", starts_at + document * 8)):
        changed = bytearray(whole)
        struct.pack_into(kind, changed, place, value)
        idx.write_bytes(changed)
        if changed != whole:
            with pytest.raises(ValueError, match=r"a\.idx is damaged at document|a\.bin is t"):
                check_corpora(data)
    changed = bytearray(whole)
    struct.pack_into("<q", changed, len(whole) - 8, value)  # Megatron asserts it
    idx.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"a\.idx is damaged: it ends at document {value} of 40"):
        check_corpora(data)


def test_an_index_of_many_empty_documents_is_refused_before_it_is_read(tmp_path: Path):
    prefix, documents = write_tokens(tmp_path / "a", 0), 2 * 10**8
    with open(f"{prefix}.idx", "r+b") as idx:
        idx.write(INDEX_HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, documents, 1))
        idx.truncate(INDEX_HEADER.size + documents * 12 + 8)  # a hole, which takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"a\.idx holds 200000000 documents, more than the 2000 tokens of .*a\.bin"):
        check_corpora(DataConfig(train=[prefix]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"
    os.unlink(f"{prefix}.idx")


def test_a_manifest_with_an_id_that_the_model_lacks_is_refused(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)])
    (tmp_path / "a.json").write_text(json.dumps({"vocab_size": 600, "tokenizer": "tok", "max_token_id": 511}))
    check_vocabulary(data, 512)  # ids of the tokenizer that do not occur are allowed
    with pytest.raises(ValueError, match=r"data.train: .*a.bin holds the token id 511 \(.*tok\).*vocab_size is 511"):
        check_vocabulary(data, 511)


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', "[1]", '{"max_token_id": "600"}', '{"max_token_id": true}', ""]
)
def test_somebody_elses_json_beside_token_files_is_left_alone(tmp_path: Path, text: str):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)])
    (tmp_path / "a.json").write_text(text)
    check_vocabulary(data, 1)


def test_a_manifest_that_was_cut_short_is_refused(tmp_path: Path):
    """Without it, nothing would tell that another tokenizer made the files."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "def add(a, b)"}\n')
    train_tokenizer([text], tmp_path / "tokenizer", 300)
    prepare([str(text)], str(tmp_path / "a"), str(tmp_path / "tokenizer"), num_workers=1, progress=False)
    content = (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.json cannot be read: .*; restore it, or remove it and prepare"):
        check_vocabulary(DataConfig(train=[str(tmp_path / "a")]), 512)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_either_file_names_the_pair(tmp_path: Path, suffix: str):
    prefix, other = write_tokens(tmp_path / "a", 0), write_tokens(tmp_path / "b", 1)
    data = DataConfig(train=["30", prefix + suffix, "70", other], valid=[prefix + suffix])
    assert data == DataConfig(train=["30", prefix, "70", other], valid=[prefix])
    check_corpora(data)


def test_a_corpus_that_a_blend_names_twice_is_refused(tmp_path: Path):
    """Megatron shuffles both parts alike, so batches would hold every sample twice."""
    prefix, other = write_tokens(tmp_path / "a", 0), write_tokens(tmp_path / "b", 1)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(prefix + suffix)
    for again in (prefix, f"{tmp_path}/./a", str(tmp_path / "link")):
        for train in (["50", prefix, "50", other, "50", again], [prefix, again]):
            with pytest.raises(
                ValueError, match=r"^data.train names \S+/a twice(, also as \S+)?: .* sum of its weights$"
            ):
                check_corpora(DataConfig(train=train))
    check_corpora(DataConfig(train=[prefix, other], valid=[prefix]))

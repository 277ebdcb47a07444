"""Packs as samples, alone and in a blend with other token files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_nemo.config import DataConfig, RunConfig, StudentConfig, TrainingConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.datasets import build_datasets
from distill_nemo.training.entry import resolve_models
from tests.tiny_models import write_hf
from tests.token_files import write_packs, write_tokens

LENGTH = 8
PACKS = [[[11, 12, 13], [21, 22], [31, 32, 33, 34]], [[41, 42], [51]], [list(range(60, 69))]]  # 9, 3 and 9 tokens
COUNTS = [[[0, 0, 1], [0, 1], [0, 1, 0, 1]], [[1, 1], [1]], [[0] * 8 + [1]]]


def build(tmp_path: Path, train: list[str], num_train: int = 3, num_valid: int = 0, num_ids: int = 65_536, **options):
    data = DataConfig(train=train, sequence_length=LENGTH, **{"split": "1,0,0"} | options)
    return build_datasets(data, TrainingConfig(seed=1), tmp_path / "cache", num_train, num_valid, num_ids)[0]


def by_first_token(dataset, count: int) -> dict[int, dict[str, list]]:
    samples = [dataset[i] for i in range(count)]
    return {int(sample["tokens"][0]): {name: x.tolist() for name, x in sample.items()} for sample in samples}


@pytest.mark.parametrize(
    ("loss_on", "counted"),
    [
        (None, [0, 1, 0, 1, 0, 1, 0, 1]),
        ("last", [0, 1, 0, 1, 0, 0, 0, 1]),
        ("all", [1, 1, 0, 1, 0, 1, 1, 1]),
    ],
)
def test_a_sample_is_a_pack_and_its_padding_with_documents_apart(tmp_path: Path, loss_on: Any, counted: list[int]):
    built = build(tmp_path, [write_packs(tmp_path / "a", PACKS, LENGTH, counts=COUNTS)], loss_on=loss_on)
    found = by_first_token(built, 3)
    assert found[11] == {
        "tokens": [11, 12, 13, 21, 22, 31, 32, 33],
        "labels": [12, 13, 21, 22, 31, 32, 33, 34],
        "position_ids": [0, 1, 2, 0, 1, 0, 1, 2],
        "document_starts": [0, 0, 0, 3, 3, 5, 5, 5],
        "loss_mask": counted,
    }
    assert found[41]["tokens"] == [41, 42, 51, 0, 0, 0, 0, 0] and found[41]["labels"] == [42, 51, 0, 0, 0, 0, 0, 0]
    assert found[41]["document_starts"] == [0, 0, 2, 3, 3, 3, 3, 3]
    assert found[41]["position_ids"] == [0, 1, 0, 0, 1, 2, 3, 4]
    assert found[41]["loss_mask"] == [1, 0, 0, 0, 0, 0, 0, 0], "neither padding nor another document's token counts"
    assert found[60]["loss_mask"] == ([1] * 8 if loss_on == "all" else [0] * 7 + [1])


def test_passes_over_packs_are_permutations_that_further_passes_do_not_change(tmp_path: Path):
    prefix = write_packs(tmp_path / "a", [[[first, first + 1]] for first in range(10, 90, 2)], LENGTH)
    firsts = [[int(build(tmp_path, [prefix], n)[i]["tokens"][0]) for i in range(n)] for n in (40, 41, 120)]
    assert firsts[2][:41] == firsts[1] and firsts[1][:40] == firsts[0]
    passes = [firsts[2][i : i + 40] for i in (0, 40, 80)]
    assert [sorted(numbers) for numbers in passes] == [list(range(10, 90, 2))] * 3 and passes[0] != passes[1]
    held_out = DataConfig(train=[prefix], split="3,1,0", sequence_length=LENGTH)
    train, valid = build_datasets(held_out, TrainingConfig(), tmp_path / "cache", 30, 10, 100)
    seen = [{int(part[i]["tokens"][0]) for i in range(len(part))} for part in (train, valid)]
    assert len(seen[0]) == 30 and len(seen[1]) == 10 and not seen[0] & seen[1]


@pytest.mark.parametrize("reset_at_documents", [False, True])
def test_every_sample_of_a_blend_with_packs_says_where_documents_start(tmp_path: Path, reset_at_documents: bool):
    packs, plain = write_packs(tmp_path / "a", PACKS, LENGTH), write_tokens(tmp_path / "b", 10_000, length=5)
    built = build(tmp_path, ["50", packs, "50", plain], 40, reset_at_documents=reset_at_documents)
    samples = [built[i] for i in range(40)]
    assert all(sample["document_starts"].shape == (LENGTH,) for sample in samples)
    spliced = [sample for sample in samples if sample["tokens"][0] >= 10_000]
    assert len(spliced) == 20
    for sample in spliced:
        assert bool(sample["document_starts"].any()) == reset_at_documents
        assert torch.equal(sample["position_ids"], torch.arange(LENGTH) - sample["document_starts"])


def test_an_id_in_a_pack_that_the_model_lacks_is_refused_with_its_place(tmp_path: Path):
    built = build(tmp_path, [write_packs(tmp_path / "a", PACKS, LENGTH)], num_ids=68)
    with pytest.raises(ValueError, match=r"a\.bin: token 8 of window 2 \(both from 0\) is the id 68, but .* 0 to 67"):
        by_first_token(built, 3)


@pytest.mark.parametrize(
    ("pack", "bounds", "message"),
    [
        (16, None, r"data\.train: .*a\.bin holds packs of 16 tokens, but data\.sequence_length = 8: .* pack=8"),
        (7, None, r"packs of 7 tokens"),
        (1, None, r"a\.json is damaged: pack = 1 is not"),
        ("8", None, r"a\.json is damaged: pack = '8' is not"),
        (8, [0, 4, 5, 6], r"a\.idx is damaged: it bounds no packs of 8 tokens"),
        (8, [0, 3, 2, 6], r"a\.idx is damaged"),
        (8, [1, 3, 5, 6], r"a\.idx is damaged"),
        (8, [0, 3, 3, 6], r"a\.idx is damaged"),
        (8, [0, 3, 2**62, 6], r"a\.idx is damaged"),
    ],
)
def test_packs_that_do_not_fit_are_refused(tmp_path: Path, pack: Any, bounds: list[int] | None, message: str):
    prefix = write_packs(tmp_path / "a", PACKS, pack)
    if bounds:
        index = Path(f"{prefix}.idx")
        index.write_bytes(index.read_bytes()[: -8 * len(bounds)] + np.array(bounds, np.int64).tobytes())
    with pytest.raises(ValueError, match=message):
        check_corpora(DataConfig(train=[prefix], sequence_length=LENGTH))


@pytest.mark.parametrize("manifest", [None, b"", b"{", b'{"pack": 8', b"[8]", b"\xff", b"{}"])
def test_packs_without_their_manifest_are_not_read_as_plain_documents(tmp_path: Path, manifest: bytes | None):
    prefix = write_packs(tmp_path / "a", PACKS, LENGTH)
    path = Path(f"{prefix}.json")
    path.unlink()
    if manifest is not None:
        path.write_bytes(manifest)
    with pytest.raises(ValueError, match=r"a\.idx puts documents together, .*a\.json, which .* is missing or does not"):
        check_corpora(DataConfig(train=[prefix], sequence_length=LENGTH))


@pytest.mark.parametrize(
    ("family", "length", "message"),
    [
        ("nemotron_h", LENGTH, r"a mamba in layer 0, whose state cannot be reset .* prepare the text without pack"),
        ("qwen3_5_text", LENGTH, r"a gated_delta_net in layer 0, .* without pack"),
        ("llama", 4096, r"data\.sequence_length = 4096 is longer than the student's max_position_embeddings = \d+"),
    ],
)
def test_packs_that_a_model_cannot_read_are_refused(tmp_path: Path, family: str, length: int, message: str):
    data = DataConfig(train=[write_packs(tmp_path / "a", PACKS, length)], sequence_length=length)
    student = StudentConfig(checkpoint=write_hf(tmp_path / "model", family))
    with pytest.raises(ValueError, match=message):
        resolve_models(RunConfig(str(tmp_path / "run"), student, None, data=data))


def test_packs_need_no_option_to_keep_documents_apart(tmp_path: Path):
    data = DataConfig(train=[write_packs(tmp_path / "a", PACKS, LENGTH)], sequence_length=LENGTH)
    config = RunConfig(str(tmp_path), StudentConfig(checkpoint=write_hf(tmp_path / "model", "llama")), None, data=data)
    assert resolve_models(config)[1].student.documents_apart
    config.data = DataConfig(train=[write_tokens(tmp_path / "b", 0)], sequence_length=LENGTH)
    assert not resolve_models(config)[1].student.documents_apart

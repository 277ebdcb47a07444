"""A plan says how often a run reads each part of its data."""

import json
from pathlib import Path

import pytest

from distill_nemo.config import DataConfig, RunConfig, StudentConfig, TrainingConfig
from distill_nemo.planning.corpora import parts_of_blend
from tests.token_files import write_documents, write_packs

TRAINING = TrainingConfig(steps=10, global_batch_size=4)


def corpus(tmp_path: Path, name: str, lengths: list[int], counted: int | None = None) -> str:
    prefix = write_documents(tmp_path / name, [[1] * length for length in lengths])
    if counted is not None:
        Path(f"{prefix}.json").write_text(json.dumps({"tokens": sum(lengths), "counted_tokens": counted}))
    return prefix


def config(**data) -> RunConfig:
    return RunConfig(
        "", StudentConfig(), data=DataConfig(sequence_length=25, **data), training=TRAINING
    )  # reads 1,000 tokens


def test_passes_follow_from_weights_or_from_sizes(tmp_path: Path):
    a, b = corpus(tmp_path, "a", [60, 40], counted=25), corpus(tmp_path, "b", [400])
    one, two = parts_of_blend(config(train=["3", a, "1", b], valid=[b]))
    assert (one.share, one.passes, one.tokens, one.valid_share) == (0.75, 7.5, 100, 0.25)
    assert (two.share, two.passes, two.tokens, two.valid_share) == (0.25, 0.625, 400, None)
    assert [part.passes for part in parts_of_blend(config(train=[a, b], valid=[b]))] == [2.0, 2.0]


def test_a_corpus_that_is_named_twice_is_refused_as_by_the_run(tmp_path: Path):
    a = corpus(tmp_path, "a", [60, 40])
    with pytest.raises(ValueError, match=r"data\.train names \S+/a twice: "):
        parts_of_blend(config(train=["1", a, "1", a]))


DAMAGES = {
    "empty": (lambda idx: b"", "is empty"),
    "zeros": (lambda idx: bytes(len(idx)), "is not a Megatron index"),
    "cut in its header": (lambda idx: idx[:20], "holds no documents"),
    "cut after the lengths": (lambda idx: idx[:50], "is truncated"),
    "of more documents": (lambda idx: idx[:18] + (10**9).to_bytes(8, "little") + idx[26:], "is truncated"),
    "other lengths": (lambda idx: idx[:34] + (70).to_bytes(4, "little") + idx[38:], "is damaged at document"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused_as_by_the_run(tmp_path: Path, case: str):
    path, (damage, message) = corpus(tmp_path, "a", [60, 40]), DAMAGES[case]
    index = Path(f"{path}.idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(ValueError, match=rf"data\.train: \S+/a\.idx {message}"):
        parts_of_blend(config(train=[path]))


def test_passes_over_packs_are_passes_over_their_samples(tmp_path: Path):
    packs = write_packs(tmp_path / "a", [[[1] * 12, [2] * 8]] * 10, 25)  # 200 tokens in 10 samples of 25
    (part,) = parts_of_blend(config(train=[packs], valid=[packs]))
    assert (part.passes, part.tokens) == (4.0, 250)
    plain = corpus(tmp_path, "b", [250])
    assert [part.share for part in parts_of_blend(config(train=[packs, plain], valid=[plain]))] == [0.5, 0.5]


def test_held_out_documents_are_not_read(tmp_path: Path):
    (part,) = parts_of_blend(config(train=[corpus(tmp_path, "a", [50, 50])], split="1,1,0"))
    assert (part.tokens, part.passes) == (50, 20.0)


def test_all_tokens_count_if_asked_for(tmp_path: Path):
    (part,) = parts_of_blend(config(train=[corpus(tmp_path, "a", [50, 50], counted=10)], loss_on="all"))
    assert part.valid_share is None


@pytest.mark.parametrize("missing", ["any", "nothing/there"])
def test_files_that_do_not_exist_yet_give_no_parts(missing: str):
    assert parts_of_blend(config(train=[missing])) == []

"""Datasets, blends, the checks of token files, and the sampler."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.datasets import build_datasets, check_token_files, check_vocabulary, parse_blend
from distill_nemo.data.samplers import batches


def write_tokens(prefix: Path, first: int, documents: int = 40, length: int = 50) -> str:
    """Documents of consecutive ids from `first` on: every token tells where it stood."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i in range(documents):
        ids = np.arange(first + i * length, first + (i + 1) * length)
        builder.add_document(torch.from_numpy(ids), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def build(data: DataConfig, tmp_path: Path, num_train: int = 30, num_valid: int = 5, seed: int = 1) -> Any:
    return build_datasets(data, TrainingConfig(seed=seed), tmp_path / "cache", num_train, num_valid)


def ids(dataset: Dataset, count: int) -> set[int]:
    return set(torch.cat([dataset[i]["tokens"] for i in range(count)]).tolist())


def test_split_keeps_documents_apart_and_labels_follow_tokens(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 100)], split="80,20,0", sequence_length=16)
    train, valid = build(data, tmp_path)
    boundary = 100 + 32 * 50
    assert max(ids(train, 30)) < boundary <= min(ids(valid, 5))
    item = train[3]
    assert item["tokens"].shape == item["labels"].shape == (16,) and item["loss_mask"].sum() == 16
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert train[0]["position_ids"].tolist() == list(range(16))


def test_samples_repeat_in_epochs_and_depend_on_seed_and_contents(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)], split="1,0,0", sequence_length=16)
    train, valid = build(data, tmp_path, num_train=400, num_valid=0)  # 2,000 tokens are 124 samples
    assert len(train) >= 400 and valid is None
    order = [train[i]["tokens"].tolist() for i in range(400)]
    assert order == [build(data, tmp_path, 400, 0)[0][i]["tokens"].tolist() for i in range(400)]
    assert order != [build(data, tmp_path, 400, 0, seed=2)[0][i]["tokens"].tolist() for i in range(400)]
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one folder per order, none half built"
    write_tokens(tmp_path / "a", 7000)  # other contents under the old name
    assert min(ids(build(data, tmp_path, 400, 0)[0], 400)) >= 7000


@pytest.mark.parametrize(("weights", "share"), [(("30", "70"), 0.3), ((), 0.25)])
def test_blends_are_weighted(tmp_path: Path, weights: tuple, share: float):
    a, b = write_tokens(tmp_path / "a", 0, documents=20), write_tokens(tmp_path / "b", 10_000, documents=60)
    train = ["30", a, "70", b] if weights else [a, b]  # without weights: by tokens, and beyond one epoch
    valid = write_tokens(tmp_path / "v", 30_000)
    data = DataConfig(train=train, valid=[valid], sequence_length=16)
    dataset, held_out = build(data, tmp_path, num_train=1000)
    assert len(dataset) >= 1000
    from_a = np.mean([dataset[i]["tokens"][0].item() < 10_000 for i in range(1000)])
    assert abs(from_a - share) < 0.01
    assert min(ids(held_out, 5)) >= 30_000
    batch = next(stream(dataset, 0, 4, 2, 0, 1))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}


def test_blend_notation():
    assert parse_blend("data.train", ["a"]) == (["a"], None)
    assert parse_blend("data.train", ["a", "b"]) == (["a", "b"], None)
    assert parse_blend("data.train", ["30", "a", "0.5", "b"]) == (["a", "b"], [30.0, 0.5])
    for wrong in ([], ["30", "a", "b"], ["30", "a", "x", "b"], ["0", "a"], ["-1", "a"], ["nan", "a"], ["a", "3"]):
        with pytest.raises(ValueError, match=r"data\.train"):
            parse_blend("data.train", wrong)


def test_splits_without_documents_are_refused(tmp_path: Path):
    prefix = write_tokens(tmp_path / "a", 0, documents=3)
    for split in ("1,0,0", "969,30,1"):
        with pytest.raises(ValueError, match=r"leaves nothing of the 3 documents .* for validation"):
            build(DataConfig(train=[prefix], split=split, sequence_length=16), tmp_path)
    for split in ("", "x,1", "1,1,1,1", "-1,2", "0,0,0"):
        with pytest.raises(ValueError, match=r"data\.split must be"):
            build(DataConfig(train=[prefix], split=split, sequence_length=16), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_damaged_token_files_are_refused(tmp_path: Path):
    prefix = write_tokens(tmp_path / "a", 0)
    data = DataConfig(train=[prefix], valid=[prefix])
    check_token_files(data)
    bin_, idx = tmp_path / "a.bin", tmp_path / "a.idx"
    whole_bin, whole_idx = bin_.read_bytes(), idx.read_bytes()
    damage = [
        (whole_bin[:-10], whole_idx, r"a\.bin is truncated: 3990 bytes instead of 4000"),
        (whole_bin + b"xx", whole_idx, r"a\.bin is too long: 4002 bytes instead of 4000"),
        (b"", whole_idx, r"a\.bin is empty"),
        (whole_bin, whole_idx[:-8], r"a\.idx is truncated"),
        (whole_bin, whole_idx[:20], r"a\.idx is not a Megatron index|a\.idx is truncated"),
        (whole_bin, b"other" + whole_idx[5:], r"a\.idx is not a Megatron index"),
    ]
    for new_bin, new_idx, message in damage:
        bin_.write_bytes(new_bin)
        idx.write_bytes(new_idx)
        with pytest.raises(ValueError, match=message) as error:
            build(data, tmp_path)
        assert "nemo distill prepare" in str(error.value)
    bin_.unlink()
    idx.write_bytes(whole_idx)
    with pytest.raises(ValueError, match=r"data\.train: no file .*a\.bin"):
        check_token_files(data)


def test_a_manifest_with_an_id_that_the_model_lacks_is_refused(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)])
    (tmp_path / "a.json").write_text(json.dumps({"vocab_size": 600, "tokenizer": "tok", "max_token_id": 511}))
    check_vocabulary(data, 512)  # ids of the tokenizer that do not occur are no obstacle
    with pytest.raises(ValueError, match=r"data.train: .*a.bin holds the token id 511 \(.*tok\).*vocab_size is 511"):
        check_vocabulary(data, 511)


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', "[1]", '{"max_token_id": "600"}', '{"max_token_id": true}', ""]
)
def test_somebody_elses_json_beside_token_files_is_left_alone(tmp_path: Path, text: str):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)])
    (tmp_path / "a.json").write_text(text)
    check_vocabulary(data, 1)


def test_an_index_cache_that_was_cut_short_by_a_kill_is_not_used(tmp_path: Path, monkeypatch):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)], sequence_length=16)
    with monkeypatch.context() as killed:
        killed.setattr("os.rename", lambda *_: None)  # before it was whole; then the same process id comes again
        build(data, tmp_path)
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-40])
    train, _ = build(data, tmp_path)
    assert train[0]["tokens"].shape == (16,)


class Numbers(Dataset):
    """Sample i holds the number i."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: torch.full((3,), i) for name in ("tokens", "labels", "loss_mask", "position_ids")}


def stream(dataset, consumed, global_batch, micro_batch, rank, ranks, num_workers=0):
    return batches(
        dataset,
        consumed_samples=consumed,
        global_batch_size=global_batch,
        micro_batch_size=micro_batch,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        num_workers=num_workers,
    )


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_global_batches_do_not_depend_on_the_layout(ranks: int, micro_batch: int):
    num_micro = 12 // ranks // micro_batch
    for consumed in (0, 24, 990):
        streams = [stream(Numbers(), consumed, 12, micro_batch, rank, ranks) for rank in range(ranks)]
        for step in range(3):
            micro = [list(islice(s, num_micro)) for s in streams]
            seen = [int(batch["tokens"][row, 0]) for rank in micro for batch in rank for row in range(micro_batch)]
            first = consumed + 12 * step
            assert seen == [i % 1000 for i in range(first, first + 12)]


def test_a_resumed_stream_goes_on_where_it_stopped_also_with_workers():
    straight = [batch["tokens"] for batch in islice(stream(Numbers(), 0, 8, 2, 1, 2), 10)]
    resumed = [batch["tokens"] for batch in islice(stream(Numbers(), 24, 8, 2, 1, 2, num_workers=2), 4)]
    assert all(torch.equal(a, b) for a, b in zip(straight[6:], resumed, strict=True))
    batch = next(stream(Numbers(), 0, 8, 2, 0, 1))
    assert batch["loss_mask"].dtype == torch.float32 and batch["tokens"].shape == (2, 3)


def built_on_rank(folder: str) -> tuple[list[list[int]], list[int]]:
    path = Path(folder)
    torch.distributed.init_process_group("gloo")
    data = DataConfig(train=["1", str(path / "a"), "3", str(path / "b")], split="90,10,0", sequence_length=16)
    train, valid = build(data, path)
    torch.distributed.destroy_process_group()
    return [train[i]["tokens"].tolist() for i in range(30)], valid[0]["tokens"].tolist()


def test_ranks_share_one_cache_and_one_order(tmp_path: Path, two):
    write_tokens(tmp_path / "a", 0)
    write_tokens(tmp_path / "b", 5000)
    first, second = two.run(built_on_rank, str(tmp_path))
    assert first == second
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".tmp"]) == 1

"""Datasets, blends, the order of samples, the ids in them, and the sampler. Token files: test_token_files.py."""

import multiprocessing
import os
import resource
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.datasets import build_datasets
from distill_nemo.data.samplers import batches
from distill_nemo.data.token_dataset import TokenDataset
from distill_nemo.runtime.watched_file import WatchedFile
from tests.token_files import write_documents, write_tokens

NUM_IDS = 65_536  # of a model that has every id of uint16


def build(
    data: DataConfig, tmp_path: Path, num_train: int = 30, num_valid: int = 5, seed: int = 1, num_ids: int = NUM_IDS
) -> Any:
    return build_datasets(data, TrainingConfig(seed=seed), tmp_path / "cache", num_train, num_valid, num_ids)


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
    write_tokens(tmp_path / "a", 7000)  # other content under the old name
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


def test_splits_without_documents_are_refused(tmp_path: Path):
    prefix = write_tokens(tmp_path / "a", 0, documents=3)
    for split in ("1,0,0", "969,30,1"):
        with pytest.raises(ValueError, match=r"leaves nothing of the 3 documents .* for validation"):
            build(DataConfig(train=[prefix], split=split, sequence_length=16), tmp_path)
    for split in ("", "x,1", "1,1,1,1", "-1,2", "0,0,0"):
        with pytest.raises(ValueError, match=r"data\.split must be"):
            build(DataConfig(train=[prefix], split=split, sequence_length=16), tmp_path)
    assert not (tmp_path / "cache").exists()


def samples_of(dataset: Dataset, count: int) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(count)]


@pytest.mark.parametrize("blend", ["{a}", "{a} {b}", "30 {a} 70 {b}", "1 {a} 1 {a}", "{tiny}"])
def test_the_order_of_samples_does_not_depend_on_how_many_are_asked_for(tmp_path: Path, blend: str):
    """124 samples of 16 tokens are one pass over `a`. A sample of `tiny` takes more than one pass."""
    written = {
        "a": write_tokens(tmp_path / "a", 0),
        "b": write_tokens(tmp_path / "b", 10_000, documents=7, length=33),
        "tiny": write_documents(tmp_path / "tiny", [[1, 2, 3], [4], [5, 6]]),
    }
    data = DataConfig(train=blend.format(**written).split(), split="1,0,0", sequence_length=16)
    longest = samples_of(build(data, tmp_path, 700, 0)[0], 700)
    for count in (1, 99, 124, 125, 200, 247, 248, 372, 480):
        assert samples_of(build(data, tmp_path, count, 0)[0], count) == longest[:count], count


def test_a_pass_reads_each_sample_once_and_the_next_in_another_order(tmp_path: Path):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)], split="1,0,0", sequence_length=20)
    found = samples_of(build(data, tmp_path, 299, 0)[0], 299)
    passes = [found[:99], found[99:199], found[199:]]  # the label after the 100th sample is the next pass's
    for samples in passes:
        assert len({token for sample in samples for token in sample}) >= 99 * 20
    assert passes[0] != passes[1][:99] and passes[1] != passes[2]


def test_a_single_pass_is_in_megatrons_own_order(tmp_path: Path):
    prefix = write_tokens(tmp_path / "a", 0)
    built = build(DataConfig(train=[prefix], split="1,0,0", sequence_length=16), tmp_path, 124, 0)[0]
    assert isinstance(built, TokenDataset) and len(built) == 124
    built.config.path_to_cache = str(tmp_path / "megatron")
    documents = np.arange(40, dtype=np.int32)
    plain = GPTDataset(IndexedDataset(prefix), prefix, documents, 124, Split.train, built.config)
    assert samples_of(built, 124) == samples_of(plain, 124)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (300, np.uint16),  # the first id beyond the model's, and one in its padding
        (383, np.uint16),
        (65_535, np.uint16),
        (-1, np.int8),
        (-1, np.int32),  # Megatron's padding
        (-300, np.int16),
        (2**31 - 1, np.int32),
        (-(2**31), np.int32),
        (2**32 + 5, np.int64),  # in 32 bits it would be 5
        (-(2**63) + 1, np.int64),
    ],
)
def test_an_id_that_the_model_lacks_is_refused_with_its_place(tmp_path: Path, bad: int, dtype: Any):
    documents = [[7] * 9, [], [8] * 40, [9] * 3]
    for document, token in ((0, 0), (0, 8), (2, 0), (2, 39), (3, 2)):
        placed = [list(ids) for ids in documents]
        placed[document][token] = bad
        prefix = write_documents(tmp_path / f"{document}_{token}", placed, dtype)
        data = DataConfig(train=[prefix], valid=[prefix], sequence_length=8)
        output = f"{prefix}.bin: token {token} of document {document} (both from 0) is the id {bad}, but the model has"
        for dataset in build(data, tmp_path, 20, 20, num_ids=300):
            assert refused(dataset).startswith(output)


def refused(dataset: Dataset, num_workers: int = 0) -> str:
    with pytest.raises(ValueError) as error:
        list(islice(stream(dataset, 0, 1, 1, 0, 1, num_workers), 20))
    return str(error.value)


def test_a_data_worker_refuses_in_the_same_words(tmp_path: Path):
    prefix = write_documents(tmp_path / "a", [[7] * 90, [300]])
    train, _ = build(DataConfig(train=[prefix], split="1,0,0", sequence_length=8), tmp_path, 20, 0, num_ids=300)
    assert refused(train, num_workers=1) == refused(train)


def test_the_largest_id_of_the_model_passes(tmp_path: Path):
    prefix = write_documents(tmp_path / "a", [[0, 299] * 20])
    train, _ = build(DataConfig(train=[prefix], split="1,0,0", sequence_length=8), tmp_path, 4, 0, num_ids=300)
    assert samples_of(train, 4) == [[0, 299] * 4] * 4


def test_tokens_are_not_mapped_and_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path):
    prefix = write_tokens(tmp_path / "a", 0)
    train, _ = build(DataConfig(train=[prefix], split="1,0,0", sequence_length=16), tmp_path, num_valid=0)
    assert train[0]["tokens"].numel() == 16
    assert f"{prefix}.bin" not in Path("/proc/self/maps").read_text(), "SIGBUS would end this process"
    file = WatchedFile(f"{prefix}.bin")
    os.truncate(file.path, 100)  # after the sizes were compared
    assert file.read(np.uint16, 50, 0).size == 50
    with pytest.raises(ValueError, match=r"a\.bin has 100 bytes now, and had 4000 when"):
        file.read(np.uint16, 10, 90)


@pytest.mark.parametrize("blend", ["{a}", "1 {a} 1 {a}"])
@pytest.mark.parametrize("limit", [0, 200, 600])
def test_an_index_cache_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path: Path, blend: str, limit: int):
    data = DataConfig(train=blend.format(a=write_tokens(tmp_path / "a", 0)).split(), split="1,0,0", sequence_length=16)
    with pytest.raises(OSError, match=rf"the index cache {tmp_path}/cache could not be written .* data\.cache"):
        built_with_limit(data, tmp_path, limit)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
    assert build(data, tmp_path, 400, 0)[0]


@pytest.mark.parametrize("blend", ["{a}", "1 {a} 1 {b}"])
def test_a_damaged_index_cache_is_built_again(tmp_path: Path, blend: str, capfd):
    """A power loss may leave files empty or cut; a changed number would give other samples without a word."""
    a, b = (write_tokens(tmp_path / name, first) for name, first in (("a", 0), ("b", 100)))
    data = DataConfig(train=blend.format(a=a, b=b).split(), split="1,0,0", sequence_length=16)
    expected = samples_of(build(data, tmp_path, 40, 0)[0], 40)
    damages = {
        "emptied": lambda file: file.write_bytes(b""),
        "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
        "changed": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"),
        "gone": lambda file: file.unlink(),
        "no text": lambda file: file.write_bytes(b"\xff\xfe"),
    }
    (cache,) = (tmp_path / "cache").iterdir()
    names = sorted(file.name for file in cache.iterdir())
    assert "SHA256SUMS" in names and len(names) > 3
    for name in names:
        for damage in damages.values():
            damage(cache / name)
            assert samples_of(build(data, tmp_path, 40, 0)[0], 40) == expected
            assert f"the index cache {cache} is not whole: it is built again" in capfd.readouterr().out
            assert sorted(file.name for file in cache.iterdir()) == names
    assert samples_of(build(data, tmp_path, 40, 0)[0], 40) == expected
    assert not capfd.readouterr().out and [cache] == list((tmp_path / "cache").iterdir())


def test_an_index_cache_that_rank_0_cannot_write_is_reported(tmp_path: Path, one):
    """Megatron reports it in another way inside a process group."""
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)], split="1,0,0", sequence_length=16)
    with pytest.raises(OSError, match=r"the index cache .* could not be written .* data\.cache"):
        one.run(built_in_a_group, data, tmp_path, 0)


def built_with_limit(data: DataConfig, tmp_path: Path, limit: int) -> None:
    """Build with file sizes limited by the kernel: EFBIG takes the place of a full disk's ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        build(data, tmp_path, 400, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def built_in_a_group(data: DataConfig, tmp_path: Path, limit: int) -> None:
    torch.distributed.init_process_group("gloo")
    try:
        built_with_limit(data, tmp_path, limit)
    finally:
        torch.distributed.destroy_process_group()


def test_an_index_cache_that_was_cut_short_by_a_kill_is_not_used(tmp_path: Path, monkeypatch):
    data = DataConfig(train=[write_tokens(tmp_path / "a", 0)], sequence_length=16)
    with monkeypatch.context() as killed:
        killed.setattr("os.rename", lambda *_: None)  # killed before it was whole; then the same process id comes again
        build(data, tmp_path)
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-40])
    train, _ = build(data, tmp_path)
    assert train[0]["tokens"].shape == (16,)


class Numbers(Dataset):
    """Dataset whose sample i holds the number i."""

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


def test_a_dead_data_worker_is_reported_by_the_next_batch_and_interrupts_nothing_else(monkeypatch):
    """The handler of torch would raise in unrelated code, such as a save, which would then seem to fail."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)  # as in a new process
    others = set(multiprocessing.active_children())
    dying = stream(Mortal(), 0, 1, 1, 0, 1, num_workers=1)
    while set(multiprocessing.active_children()) - others:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"a data worker died.* lower data\.num_workers; run the same command again"):
        list(dying)


class Mortal(Numbers):
    """Dataset whose reader is killed at sample 1."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


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

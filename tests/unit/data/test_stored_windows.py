"""Teacher stores as data of a run, alone and beside token files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_nemo.config import DataConfig, RunConfig, StudentConfig, TrainingConfig
from distill_nemo.data.corpora import check_corpora, corpus_at
from distill_nemo.data.datasets import build_datasets
from distill_nemo.data.samplers import batches
from distill_nemo.data.token_files import check_vocabulary, documents_apart
from distill_nemo.planning.corpora import parts_of_blend
from distill_nemo.runtime.checksums import sha256
from distill_nemo.teacher_store.manifest import MANIFEST
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import finish_store
from tests.stores import L, V, manifest_of, random_window, write_store, write_windows
from tests.token_files import write_tokens


def datasets(tmp_path, manifest, samples=10, with_targets=True, **data):
    config = DataConfig(sequence_length=L, **data)
    targets = manifest.fields if with_targets else None
    train, valid = build_datasets(config, TrainingConfig(), tmp_path / "cache", samples, 4, 4096, targets)
    return train, valid


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_samples_are_the_windows_with_targets_at_their_tokens(codec, tmp_path):
    manifest = manifest_of(codec, documents_apart=True, temperature=2.0, dtype="bfloat16")
    windows = write_store(tmp_path / "store", manifest)
    train, _ = datasets(tmp_path, manifest, train=[str(tmp_path / "store")], valid=[str(tmp_path / "store")])
    seen = set()
    for i in range(10):
        sample = train[i]
        number = next(n for n, w in enumerate(windows) if np.array_equal(w["tokens"][:-1], sample["tokens"].numpy()))
        window, counts = windows[number], torch.from_numpy(windows[number]["loss_mask"]).bool()
        seen.add(number)
        assert np.array_equal(sample["labels"].numpy(), window["tokens"][1:])  # target i is of token i + 1
        assert torch.equal(sample["loss_mask"], counts.float())
        starts = torch.from_numpy(window["document_starts"])
        assert torch.equal(sample["document_starts"], starts) and torch.equal(
            sample["position_ids"], torch.arange(L) - starts
        )
        assert torch.equal(sample["target_has_targets"].bool(), counts)
        assert {name for name in sample if name.startswith("target_")} == {f"target_{name}" for name in manifest.fields}
        for name in manifest.fields.keys() - {"has_targets"}:
            found = sample[f"target_{name}"]
            expected = torch.from_numpy(window[name].view(np.int16) if name == "hidden" else window[name])
            bits = found.view(torch.int16) if name == "hidden" else found
            assert torch.equal(bits[counts], expected) and len(found) == L
            assert (found[~counts] == (-1 if name == "ids" else 0)).all()
    assert seen == set(range(10)) and documents_apart(DataConfig(train=[str(tmp_path / "store")]))


def test_ranks_that_need_no_targets_get_none(tmp_path):
    manifest = manifest_of()
    write_store(tmp_path / "store", manifest)
    names = {"train": [str(tmp_path / "store")], "valid": [str(tmp_path / "store")]}
    with_targets, _ = datasets(tmp_path, manifest, **names)
    without, _ = datasets(tmp_path, manifest, with_targets=False, **names)
    for i in range(10):
        assert torch.equal(without[i]["tokens"], with_targets[i]["tokens"])
        assert without[i].keys() == {"tokens", "labels", "loss_mask", "position_ids"}


def test_a_blend_gives_every_batch_targets_or_none_of_them(tmp_path):
    manifest = manifest_of()
    write_store(tmp_path / "store", manifest)
    plain = write_tokens(tmp_path / "plain", 0)
    blend = ["1", str(tmp_path / "store"), "3", plain]
    train, valid = datasets(tmp_path, manifest, samples=40, train=blend, valid=[plain])
    stream = batches(
        train, consumed_samples=0, global_batch_size=4, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1
    )
    from_store = 0
    for _ in range(10):
        batch = next(stream)
        assert batch["target_ids"].shape == (4, L, 12) and batch["target_has_targets"].shape == (4, L)
        taught = batch["target_has_targets"].bool()
        assert torch.equal(taught, (batch["target_ids"] >= 0).any(-1))
        from_store += int(taught.any(1).sum())
    assert from_store == 10 and not valid[0]["target_has_targets"].any()


def test_the_order_of_the_windows_is_that_of_any_number_of_passes(tmp_path):
    manifest = manifest_of()
    write_store(tmp_path / "store", manifest)
    names = {"train": [str(tmp_path / "store")], "valid": [str(tmp_path / "store")]}
    one, _ = datasets(tmp_path, manifest, **names)
    three, _ = datasets(tmp_path, manifest, samples=30, **names)
    tokens = [three[i]["tokens"].tolist() for i in range(30)]
    assert tokens[:10] == [one[i]["tokens"].tolist() for i in range(10)] != tokens[10:20]
    assert sorted(tokens[:10]) == sorted(tokens[10:20]) == sorted(tokens[20:])


def test_the_id_of_padding_counts_where_the_mask_says_so(tmp_path):
    """Masks are by position. A tokenizer may pad with the token that ends a document, whose prediction is learnt."""
    manifest = manifest_of(num_windows=1)
    window = random_window(manifest, 0)
    window["tokens"][:] = 0
    write_windows(tmp_path / "store", manifest, [window])
    assert finish_store(tmp_path / "store")
    names = {"train": [str(tmp_path / "store")], "valid": [str(tmp_path / "store")]}
    train, _ = datasets(tmp_path, manifest, samples=1, **names)
    sample = train[0]
    assert 0 < window["loss_mask"].sum() < L
    assert (sample["loss_mask"].numpy() == window["loss_mask"]).all()
    assert (sample["target_has_targets"].numpy() == window["loss_mask"]).all()


@pytest.mark.parametrize("vocab_size", [2**16, 2**17, 2**17 + 1, 2**20])
def test_the_last_id_is_not_taken_for_none(vocab_size, tmp_path):
    """An id of all ones beside -1, in vocabularies that fill their bits and that need one more."""
    manifest = manifest_of(num_windows=1, vocab_size=vocab_size, num=3)
    window = random_window(manifest, 0)
    window["ids"][:], window["counts"][:] = [0, vocab_size - 1, -1], [1, 2, 0]
    window["top1"][:] = vocab_size - 1
    write_windows(tmp_path / "store", manifest, [window])
    assert finish_store(tmp_path / "store")
    found = TeacherStore(tmp_path / "store").window(0)
    assert all(np.array_equal(found[name], window[name]) for name in ("ids", "counts", "top1"))


def test_probabilities_of_top_k_are_within_a_4096th(tmp_path):
    """Halfway between two steps is the worst; below e**-32 nothing is told apart."""
    manifest = manifest_of("top_k", num_windows=1, num=200)
    window = random_window(manifest, 0)
    exact = -np.random.default_rng(1).exponential(4, window["logprobs"].shape).astype(np.float32)
    exact[0, :4] = 0, -(2**-12), -31.9, -1e30
    window["logprobs"] = exact
    write_windows(tmp_path / "store", manifest, [window])
    assert finish_store(tmp_path / "store")
    found = TeacherStore(tmp_path / "store").window(0)["logprobs"]
    assert found[0, 0] == 0 and -32 < found[0, 3] < -31.99
    p = np.exp(exact.clip(min=2**-11 - 32).astype(np.float64))
    worst = np.abs(np.exp(found.astype(np.float64)) / p - 1).max()
    assert 0.99 * 2**-12 < worst < 1.01 * 2**-12
    order = np.argsort(-exact, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(found, order, 1), axis=1) <= 0).all()
    for value in (0.01, np.nan):
        window["logprobs"] = np.full_like(exact, value)
        with pytest.raises(ValueError, match="log-probability that is above 0, or not a number"):
            manifest.coding.pack(window)


def test_a_rewritten_store_has_another_index_cache(tmp_path):
    names = {"train": [str(tmp_path / "store")], "valid": [str(tmp_path / "store")]}
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        write_store(tmp_path / "store", manifest_of(seed=seed, num_windows=5 * seed))
        train, _ = datasets(tmp_path, manifest_of(), **names)
        assert len({tuple(train[i]["tokens"].tolist()) for i in range(10)}) == 5 * seed
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sequence_length": 8}, r"data\.sequence_length=16 would fit"),
        ({"loss_on": "last"}, r"data\.loss_on=None would fit"),
        ({"reset_at_documents": True}, r"data\.reset_at_documents=False would fit"),
    ],
)
def test_samples_that_the_store_does_not_hold_are_refused(data, message, tmp_path):
    write_store(tmp_path / "store", manifest_of())
    config = DataConfig(train=[str(tmp_path / "store")], **({"sequence_length": L} | data))
    with pytest.raises(ValueError, match=rf"data\.train: the store .*store holds other samples .*{message}"):
        check_corpora(config)


def test_a_damaged_shard_is_refused_with_the_field(tmp_path):
    write_store(tmp_path / "store", manifest_of())
    (tmp_path / "store" / "shard-000002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"data\.train: .*shard-000002\.safetensors is missing; write the store again"):
        check_corpora(DataConfig(valid=[str(tmp_path / "store")], train=[str(tmp_path / "store")], sequence_length=L))


def test_ids_that_the_model_lacks_are_refused_by_the_manifest(tmp_path):
    write_store(tmp_path / "store", manifest_of(max_token_id=511, tokenizer="qwen"))
    data = DataConfig(train=[str(tmp_path / "store")])
    check_vocabulary(data, 512)
    with pytest.raises(ValueError, match=r"data\.train: .*store holds the token id 511 \(made with qwen\), but"):
        check_vocabulary(data, 511)


def test_a_plan_counts_passes_over_windows(tmp_path):
    windows = write_store(tmp_path / "store", manifest_of())
    data = DataConfig(train=[str(tmp_path / "store")], valid=[str(tmp_path / "store")], sequence_length=L)
    training = TrainingConfig(steps=10, global_batch_size=4)
    (part,) = parts_of_blend(RunConfig("out", StudentConfig(), data=data, training=training))
    counted = sum(int(window["loss_mask"].sum()) for window in windows)
    assert (part.tokens, part.passes, part.valid_share) == (10 * L, 4.0, counted / (10 * L))


def test_a_store_states_the_sum_of_every_file(tmp_path):
    write_store(tmp_path / "store", manifest_of("hidden"))
    corpus = corpus_at(tmp_path / "store")
    assert corpus.files == {MANIFEST: tmp_path / "store" / MANIFEST}
    assert corpus.sums == {path: sha256(path) for path in (tmp_path / "store").glob("*.safetensors")}
    assert json.loads(Path(tmp_path, "store", MANIFEST).read_text())["vocab_size"] == V

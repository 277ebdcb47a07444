"""A store written at any layout, by several jobs, and after interruptions; and its verification."""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from distill_nemo.job_config import VerifyConfig
from distill_nemo.runtime.host_memory import available_memory
from tests.distributed.checkpoint.test_no_space import file_size_limit
from tests.distributed.teacher_store_jobs.stores import (
    LENGTH,
    VOCAB,
    at,
    contents,
    interrupted,
    tiny_store,
    verify,
    windows,
    write,
    write_alone,
    write_corpus,
)
from tests.spawn import Gloo
from tests.tiny_models import write_hf

EXACT = ("tokens", "loss_mask", "document_starts")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def written(corpus, one, tmp_path_factory):
    """Return the store of one process."""
    store = tmp_path_factory.mktemp("written") / "store"
    one.run(write, tiny_store(corpus, store))
    return store


def test_stages_replicas_and_jobs_write_the_bytes_of_one_process(corpus, two, written, tmp_path):
    two.run(write, at(tiny_store(corpus, tmp_path / "stages"), pipeline_model=2))
    two.run(write, tiny_store(corpus, tmp_path / "replicas"))
    two.run(write_alone, tiny_store(corpus, tmp_path / "jobs"))
    expected = contents(written)
    assert list(expected) == ["manifest.json", *(f"shard-{i:06d}.safetensors" for i in range(5))]
    for name in ("stages", "replicas", "jobs"):
        assert contents(tmp_path / name) == expected, name


def test_a_micro_batch_beyond_the_memory_of_the_host_is_refused_before_anything_is_written(corpus, one, tmp_path):
    windows = available_memory() // 100  # of 56 bytes for each of 16 tokens
    config = tiny_store(corpus, tmp_path / "store", windows=windows, shard_windows=windows, micro_batch_size=windows)
    with pytest.raises(ValueError, match=f"micro_batch_size = {windows}: so many samples of 16 tokens take"):
        one.run(write, config)
    assert not (tmp_path / "store").exists()


def _write_in_pieces(config):
    from distill_nemo.teacher_store_jobs import teacher_run
    from distill_nemo.teacher_store_jobs import write as job

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "PIECE_TOKENS", 2 * LENGTH)
        patch.setattr(teacher_run, "CHUNK_BYTES", 8 * 4 * 512 * 3)
        encode = job.encode_chunk
        patch.setattr(job, "encode_chunk", lambda *args: seen.append(len(args[1].logits_nv)) or encode(*args))
        write(config)
    return max(seen)


def test_pieces_of_a_shard_and_parts_of_a_chunk_change_no_byte(corpus, two, written, tmp_path):
    """Both bound memory. A replica whose shard has fewer pieces goes on with the others."""
    assert two.run(_write_in_pieces, tiny_store(corpus, tmp_path / "store")) == [3, 3]
    assert contents(tmp_path / "store") == contents(written)


def _write_from_bad_data(config):
    from distill_nemo.data.token_dataset import TokenDataset

    def fail(samples, number):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(TokenDataset, "__getitem__", fail)
        try:
            write(config)
        except RuntimeError as error:
            return str(error)


def test_a_rank_that_cannot_read_its_samples_stops_all(corpus, two, written, tmp_path):
    config = tiny_store(corpus, tmp_path / "store")
    assert two.run(_write_from_bad_data, config) == ["rank 1: [Errno 5] Input/output error"] * 2
    assert not list((tmp_path / "store").glob("*.lock"))
    two.run(write, config)
    assert contents(tmp_path / "store") == contents(written)


def _write_slowly_without_locks(config):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    def slow(file):
        time.sleep(0.3)
        return fsync(file)

    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "lockf", unsupported)
        patch.setattr(os, "fsync", slow)
        write(config)


def test_replicas_do_not_write_one_shard_on_a_file_system_without_locks(corpus, one, two, tmp_path):
    one.run(write, tiny_store(corpus, tmp_path / "one", windows=3))
    two.run(_write_slowly_without_locks, tiny_store(corpus, tmp_path / "two", windows=3))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("sizes", [{"tensor_model": 2}, {"context": 2}])
def test_ranks_that_share_the_vocabulary_or_the_sequence_draw_the_same(corpus, two, written, tmp_path, sizes):
    two.run(write, at(tiny_store(corpus, tmp_path / "store"), **sizes))
    assert_same(windows(tmp_path / "store"), windows(written))


def test_experts_on_two_ranks_draw_the_same(corpus, one, two, tmp_path):
    one.run(write, tiny_store(corpus, tmp_path / "one", "moe"))
    two.run(write, at(tiny_store(corpus, tmp_path / "two", "moe"), expert_model=2))
    assert_same(windows(tmp_path / "two"), windows(tmp_path / "one"))


def assert_same(found, expected):
    for name in EXACT:
        assert (found[name] == expected[name]).all(), name
    for name in ("entropy", "label_logprob"):
        assert np.abs(found[name] - expected[name]).max() < 1e-5, name
    equal = (found["ids"] == expected["ids"]).all(-1) & (found["counts"] == expected["counts"]).all(-1)
    assert equal.mean() > 0.99


def systematic_draws(p, uniform, num):
    """Return counts of ids: for each of `num` equally spaced points the first id whose cumulative sum exceeds it."""
    points = (np.arange(num) + uniform) / num
    return np.bincount(np.searchsorted(np.cumsum(p), points, side="right").clip(max=len(p) - 1), minlength=len(p))


@pytest.fixture(scope="module")
def answers(corpus, written):
    """Return transformers' log-probabilities in fp64 of the label's position of each token that counts, in order."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(corpus / "teacher", dtype=torch.float64)
    found, stored = [], windows(written)
    for ids, mask, starts in zip(stored["tokens"], stored["loss_mask"], stored["document_starts"], strict=True):
        for first in np.unique(starts):
            own = np.flatnonzero(starts == first)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[own].astype(np.int64))[None]).logits[0]
            rows = logits.log_softmax(-1).numpy()
            found += [(rows[i - first], int(ids[i + 1])) for i in own if mask[i]]
    return found


def test_every_number_is_that_of_transformers(written, answers):
    """A target belongs to the token after its position, no padded column has any mass, and counts are exact."""
    from distill_nemo.teacher_store_jobs.draws import uniforms

    stored = windows(written)
    uniform = np.concatenate(
        [uniforms(1234, number, LENGTH)[mask > 0] for number, mask in enumerate(stored["loss_mask"])]
    )
    assert len(answers) == len(stored["entropy"]) == stored["loss_mask"].sum() > 100
    same = 0
    for i, (logprobs, label) in enumerate(answers):
        p = np.exp(logprobs)
        assert len(p) == VOCAB
        assert stored["entropy"][i] == pytest.approx(-(p * logprobs).sum(), abs=1e-5)
        assert stored["label_logprob"][i] == pytest.approx(logprobs[label], abs=1e-5)
        assert stored["top1"][i] == p.argmax()
        ids, counts = stored["ids"][i], stored["counts"][i]
        assert counts.sum() == 12 and ((ids >= 0) == (counts > 0)).all()
        assert (np.abs(counts[ids >= 0] - 12 * p[ids[ids >= 0]]) < 1 + 1e-4).all()
        drawn = np.zeros(VOCAB, np.int64)
        drawn[ids[ids >= 0]] = counts[ids >= 0]
        same += int((drawn == systematic_draws(p, uniform[i], 12)).all())
    assert same / len(answers) > 0.99


def test_windows_are_the_samples_of_the_data_and_only_tokens_that_count_have_targets(corpus, one, written):
    expected = one.run(_samples, corpus)[0]
    stored = windows(written)
    for name in EXACT:
        assert (stored[name] == expected[name]).all(), name
    assert 0.4 < stored["loss_mask"].mean() < 0.8
    assert (stored["document_starts"].max(1) > 0).any()


def test_a_micro_batch_is_no_larger_than_a_shard(corpus, one, tmp_path):
    store = tmp_path / "store"
    assert one.run(_largest_batch, tiny_store(corpus, store, shard_windows=5, micro_batch_size=40)) == [5]
    assert one.run(_largest_batch, VerifyConfig(str(store), samples=13, micro_batch_size=40)) == [5]


def _largest_batch(config):
    from distill_nemo.teacher_store_jobs import teacher_run

    sizes, collate = [], teacher_run.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_run, "collate", lambda samples: sizes.append(len(samples)) or collate(samples))
        (verify if isinstance(config, VerifyConfig) else write)(config)
    return max(sizes)


def _samples(corpus):
    from distill_nemo.config import TrainingConfig
    from distill_nemo.data.datasets import build_datasets

    data = tiny_store(corpus, "").data
    dataset, _ = build_datasets(data, TrainingConfig(seed=1234), corpus / "cache", 13, 0, VOCAB)
    samples = [dataset[i] for i in range(13)]
    tokens = [np.append(sample["tokens"], sample["labels"][-1]) for sample in samples]
    others = {name: np.stack([sample[name] for sample in samples]) for name in EXACT[1:]}
    return {"tokens": np.stack(tokens), **others}


def test_a_pass_is_all_whole_samples(corpus, one):
    from distill_nemo.data.datasets import samples_of_a_pass
    from distill_nemo.data.token_files import document_lengths

    num_tokens = int(document_lengths(str(corpus / "train")).sum())
    assert samples_of_a_pass(tiny_store(corpus, "").data) == (num_tokens - 1) // LENGTH


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGURG])
def test_an_interrupted_job_goes_on_where_it_stopped(corpus, one, written, tmp_path, number):
    """Shards that are there stay as they are, and the finished store has the bytes of an undisturbed one."""
    fields = {"windows": 52, "shard_windows": 1, "seed": 7}
    if not (whole := written.parent / "whole").exists():
        one.run(write, tiny_store(corpus, whole, **fields))
    config = tiny_store(corpus, tmp_path / "store", **fields)
    with Gloo(1, init=False) as fresh:  # in which nothing has run: its children have whole threads
        ended = fresh.run(interrupted, config, number, 3, 20)[0]
    assert ended == [*[-number if number == signal.SIGKILL else int(number)] * 2, 0]
    assert contents(tmp_path / "store") == contents(whole)


def _write_with_little_room(config):
    with file_size_limit(1000 if os.environ["RANK"] == "1" else None):
        write(config)


def test_one_writer_without_room_stops_all_and_nothing_whole_is_lost(corpus, two, written, tmp_path):
    config = tiny_store(corpus, tmp_path / "store")
    with pytest.raises(RuntimeError) as raised:
        two.run(_write_with_little_room, config)
    for part in ("store could not be written", "GiB free", "Whole shards are kept", "rank 1"):
        assert part in str(raised.value)
    names = [path.name for path in (tmp_path / "store").iterdir()]
    assert not [name for name in names if name.endswith((".partial", ".lock"))], names
    two.close()
    two.run(write, config)
    assert contents(tmp_path / "store") == contents(written)


def _write_without_room_for_the_output_layer(config):
    with file_size_limit(1000 if os.environ["RANK"] == "1" else None):
        try:
            write(config)
        except RuntimeError as error:
            return str(error)


def test_a_rank_that_cannot_write_the_output_layer_stops_all(corpus, two, tmp_path):
    config = at(tiny_store(corpus, tmp_path / "store", codec="hidden", draws=50), pipeline_model=2)
    first, second = two.run(_write_without_room_for_the_output_layer, config)
    assert first == second
    assert first.startswith(f"rank 1: {tmp_path}/store/output_layer.safetensors could not be written")


def refusal(config):
    """Return the reason for which a store is not written."""
    try:
        write(config)
    except ValueError as error:
        return str(error)
    return "written"


def test_a_store_begun_with_other_settings_is_refused_by_name(corpus, one, written, tmp_path):
    """Nothing of a complete store is written again."""
    store = tmp_path / "store"
    shutil.copytree(written, store)
    write_hf(tmp_path / "other", "llama", seed=9, layers=2)
    for end in (".bin", ".idx", ".mask"):
        shutil.copy(f"{corpus}/train{end}", f"{tmp_path}/train{end}")
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "train.bin").write_bytes(data)
    changed = tiny_store(corpus, store)
    changed.data.train = [str(tmp_path / "train")]
    cases = {
        "num: was 12, is 13": tiny_store(corpus, store, draws=13),
        "temperature: was 1.0, is 2.0": tiny_store(corpus, store, temperature=2.0),
        "seed: was 1234, is 5": tiny_store(corpus, store, seed=5),
        "codec: was 'sampled', is 'top_k'": tiny_store(corpus, store, codec="top_k", draws=50, top_k=12),
        "num_windows: was 13, is 14": tiny_store(corpus, store, windows=14),
        "teacher: was": tiny_store(tmp_path, store, "other"),
        "sources: was": changed,
    }
    cases["teacher: was"].data.train = [str(corpus / "train")]
    before = contents(store)
    for difference, config in cases.items():
        assert difference in one.run(refusal, config)[0]
    assert contents(store) == before
    assert contents(store) == before


def _write_again(config):
    """Write a store without a teacher and without hashing a file. Return what is printed."""
    from distill_nemo.checkpoint import identity
    from distill_nemo.teacher_store_jobs import write as job

    def refuse(*_):
        raise AssertionError("a complete store needs none")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(identity, "_hashed", {})  # as in a new process
        for module, name in ((identity, "hash_part"), (job, "TeacherRun"), (job, "refusal_of_sources")):
            patch.setattr(module, name, refuse)
        write(config)
    return printed.getvalue()


def test_the_same_command_on_a_complete_store_says_so_and_does_nothing(corpus, one, two, written, tmp_path):
    shutil.copytree(written, tmp_path / "store")
    config = tiny_store(corpus, tmp_path / "store")
    for ranks in (one, two):
        printed = ranks.run(_write_again, config)[0]
        assert printed.startswith(f"{tmp_path / 'store'} is complete: 13 windows, "), printed
    assert contents(tmp_path / "store") == contents(written)
    (tmp_path / "store" / "shard-000002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-000002\.safetensors is missing; write the store again"):
        one.run(_write_again, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "teacher.checkpoint is not set: a teacher of random weights teaches nothing"),
        ({"codec": "top_k", "draws": 12}, "draws = 12 needs codec=sampled, not top_k"),
        ({"codec": "hidden", "draws": 50, "temperature": 2.0}, "codec=hidden serves every temperature"),
        ({"dtype": "bfloat16"}, 'dtype = "bfloat16" needs a GPU'),
        ({"codec": "top_k", "draws": 50, "top_k": 600}, "top_k = 600 is more than teacher.vocab_size = 507"),
        ({"windows": 10**12}, "windows = 1000000000000: the order of 1,000,000,000,000 samples takes 22,352 GiB"),
        ({"tokenizer": True}, "data.tokenizer"),
    ],
)
def test_what_cannot_be_right_is_refused(inputs, corpus, one, tmp_path, fields, message):
    of_store = {name: value for name, value in fields.items() if name != "tokenizer"}
    config = tiny_store(corpus, tmp_path / "store", **of_store)
    if "tokenizer" in fields:
        config.teacher.vocab_size, config.data.tokenizer = 400, str(inputs / "tokenizer")
    assert message in one.run(refusal, config)[0]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_verify_asks_the_teacher_again(corpus, one, two, written, tmp_path, codec, capfd):
    store = written
    if codec != "sampled":
        store = tmp_path / "store"
        fields = {"codec": codec, "draws": 50, **({"top_k": 8, "temperature": 2.0} if codec == "top_k" else {})}
        two.run(write, at(tiny_store(corpus, store, **fields), tensor_model=2))
    one.run(verify, VerifyConfig(str(store), samples=6, micro_batch_size=2))
    write_hf(tmp_path / "other", "llama", seed=9, layers=2)
    config = VerifyConfig(str(store), samples=6, micro_batch_size=2)
    config.teacher.checkpoint = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"shard-\d{6}.safetensors is not the teacher's: .*label_logprob is") as raised:
        one.run(verify, config)
    assert codec != "sampled" or "chance of its draws" in str(raised.value)


def test_verify_names_a_damaged_shard(one, written, tmp_path):
    shutil.copytree(written, tmp_path / "store")
    shard = tmp_path / "store" / "shard-000003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000003\.safetensors is damaged: its SHA-256 is another"):
        one.run(verify, VerifyConfig(str(tmp_path / "store"), samples=0))

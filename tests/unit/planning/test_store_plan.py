"""Plans of a job that writes a store, against the store that it writes and the memory that it takes."""

import json
from dataclasses import replace
from functools import partial

import pytest

from distill_nemo.config import ParallelismConfig, TeacherConfig
from distill_nemo.planning.gpus import GPUS
from distill_nemo.runtime.device import setup_device
from distill_nemo.teacher_store.reader import TeacherStore
from tests.distributed.teacher_store_jobs.stores import tiny_store, write, write_corpus
from tests.tiny_models import write_hf

FIELDS = {"sampled": {}, "top_k": {"codec": "top_k", "draws": 50}, "hidden": {"codec": "hidden", "draws": 50}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return token files and teachers, one of them wide enough to measure."""
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    write_hf(root / "wide", "llama", layers=2, width=128, vocab=2048)
    return root


def planned(config, world_size=1, **settings):
    setup_device()
    from distill_nemo.planning.stores import planned_store

    return planned_store(config, world_size, **settings)


@pytest.mark.parametrize("codec", FIELDS)
def test_the_bytes_are_those_of_the_store_that_is_written(one, corpus, tmp_path, codec):
    config = tiny_store(corpus, tmp_path / "store", windows=64, shard_windows=32, **FIELDS[codec])
    store = planned(config, on_gpu=False)
    one.run(write, config)
    written = TeacherStore(tmp_path / "store")
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in written.sums)
    size, pairs = sum(path.stat().st_size for path in written.sums) - headers, 0
    assert len(written.sums) == store.manifest.num_shards + (codec == "hidden")
    if codec == "sampled":
        usual = (store.manifest.coding.usual_bytes - 1) / 2  # pairs of a token: 9 bits and 4
        pairs = 2 * (sum(shard.pairs for shard in written.contents.shards) - usual * written.num_tokens)
        assert written.num_tokens * (store.most_token_bytes - store.token_bytes) > pairs > 0  # random: more than usual
    store = replace(store, valid_share=written.num_tokens / (64 * 16))
    assert abs(size - pairs - store.num_bytes) < 2 * 8 * 2 + 1  # bounds: one more than windows, in each shard


def peak(config, temperature):
    """Return the measured peak of a micro batch of `config`'s teacher alone."""
    setup_device()
    import torch

    from benchmarks.memory import LiveBytes
    from distill_nemo.models.resolve import resolve
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.teacher_store_jobs.manifest import sized_manifest
    from distill_nemo.teacher_store_jobs.targets import encode_chunk, with_uniforms
    from distill_nemo.teacher_store_jobs.teacher_run import TeacherRun

    model, length = resolve(config.teacher), config.data.sequence_length
    manifest = sized_manifest(config, model, torch.float32)
    tokens = torch.arange(length)
    sample = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(length), "position_ids": tokens}
    samples = [with_uniforms(sample, 1, i) for i in range(config.micro_batch_size)]
    with process_groups(config.parallelism), LiveBytes() as live:
        seed_everything(0)
        encoder = partial(encode_chunk, manifest)
        run = TeacherRun(model, config.parallelism, torch.float32, config.micro_batch_size, encoder)
        run.encode(samples, 1)
        live.peak = live.live
        run.encode(samples, 1)
        return live.peak


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_is_within_5_percent_of_what_a_micro_batch_takes(one, corpus, tmp_path, temperature):
    setup_device()
    from distill_nemo.planning.stores import largest_memory

    config = tiny_store(corpus, tmp_path, teacher="wide", temperature=temperature)
    config.data.sequence_length, config.data.reset_at_documents = 128, False
    ours = largest_memory(planned(config, on_gpu=False, transformer_engine=False)).total
    (theirs,) = one.run(peak, config, temperature)
    assert abs(ours / theirs - 1) < 0.05, (ours, theirs)


@pytest.fixture
def large(corpus, tmp_path):
    """Return the job of a teacher of 78e9 parameters, of which only config.json is there."""
    (tmp_path / "large").mkdir()
    values = json.loads((corpus / "teacher" / "config.json").read_text())
    values |= {"num_hidden_layers": 64, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    values |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 4096}
    (tmp_path / "large" / "config.json").write_text(json.dumps(values))
    config = tiny_store(corpus, tmp_path / "store", windows=10_000, shard_windows=64, dtype="auto")
    config.teacher, config.data.train = TeacherConfig(checkpoint=str(tmp_path / "large")), ["not/there"]
    config.data.sequence_length = 4096
    return config


def test_a_teacher_that_does_not_fit_gets_a_layout_that_does(large, capsys):
    setup_device()
    from distill_nemo.planning.stores import print_store_plan

    run = partial(print_store_plan, gpu=GPUS["h100"], utilisation=0.4, transformer_engine=True)
    with pytest.raises(ValueError, match=r"does not fit: .* GB too much on a H100 of 80 GB; what would fit: (.*)") as e:
        run(large, 8)
    capsys.readouterr()
    fields = dict(word.split("=") for word in str(e.value).partition("what would fit: ")[2].split())
    assert fields.pop("parallelism.sequence_parallel", "True") == "True"
    sizes = {name.removeprefix("parallelism."): int(v) for name, v in fields.items() if name != "micro_batch_size"}
    large.micro_batch_size = 1
    large.parallelism = replace(ParallelismConfig(), **sizes)
    run(large, 8)
    page = capsys.readouterr().out
    assert "  windows                           10,000   of 4,096 tokens" in page and "fits, " in page
    assert max(map(len, page.splitlines())) <= 120 + len(large.output)


def test_a_store_larger_than_the_disk_is_refused(corpus, tmp_path, capsys):
    setup_device()
    from distill_nemo.planning.stores import print_store_plan

    config = tiny_store(corpus, tmp_path / "store", windows=10**11, shard_windows=2**20)
    with pytest.raises(
        ValueError, match=r"does not fit: [\d,.]+ GB too much for the disk of .*store; take another disk"
    ):
        print_store_plan(config, 1, GPUS["h100"], 0.4, True)
    assert "free at" in capsys.readouterr().out


def test_hours_are_those_of_rounds_of_shards(large):
    setup_device()
    from distill_nemo.planning.stores import seconds, token_flops

    def time(world_size, **sizes):
        large.parallelism = ParallelismConfig(**sizes)
        return seconds(planned(large, world_size), 1000, 0.5)

    large.windows, large.shard_windows, large.micro_batch_size = 640, 64, 4  # ten shards of 16 micro batches
    flops = sum(token_flops(planned(large)))
    assert time(1) == pytest.approx(640 * 4096 * flops / 0.5e15)
    assert time(8) == pytest.approx(time(1) / 5)  # two rounds, of which the last has two shards
    assert time(2, tensor_model_parallel_size=2) == pytest.approx(time(1) / 2)
    large.parallelism = ParallelismConfig(pipeline_model_parallel_size=2)
    slowest = max(token_flops(planned(large, 2))) / flops
    assert 0.5 < slowest < 0.52  # the last stage has the output layer
    assert time(2, pipeline_model_parallel_size=2) == pytest.approx(time(1) * slowest * 17 / 16)


def test_what_cannot_be_planned_is_refused(corpus, tmp_path):
    config = tiny_store(corpus, tmp_path, windows=None)
    config.data.train = ["not/there"]
    with pytest.raises(ValueError, match=r"To plan without the data, set windows"):
        planned(config)
    config = tiny_store(corpus, tmp_path)
    config.teacher.checkpoint = "/no/such"
    with pytest.raises(ValueError, match=r"not found: /no/such\. A plan reads its config\.json only"):
        planned(config)

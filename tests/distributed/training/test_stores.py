"""Runs that train from teacher stores, in place of a teacher."""

import json
import os
import shutil

import pytest

from distill_nemo.teacher_store.manifest import shard_name
from tests.spawn import Gloo
from tests.stores import manifest_of, write_store
from tests.tiny_models import write_hf
from tests.training import changed, differences, metrics, tiny_run

TOLERANCE = 1e-5  # as in test_layouts.py
LAYOUTS = {
    "one": {},
    "DP=2": {},
    "TP=2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP=2": {"pipeline_model_parallel_size": 2},
    "CP=2": {"context_parallel_size": 2},
    "EP=2": {"expert_model_parallel_size": 2},
}
FITTING = {
    "sampled": {"distillation.temperature": 2.0, "distillation.lm_weight": 0.5},
    "top_k": {"distillation.top_k": 5, "distillation.balancer": "dynamic"},
    "hidden": {"distillation.divergence": "jensen_shannon", "distillation.temperature": 3.0},
}
SHAPE = {"vocab_size": 507, "sequence_length": 32, "num_windows": 24, "windows_per_shard": 10}
FEW = [("sampled", "TP=2, SP"), ("sampled", "CP=2"), ("hidden", "PP=2")]
MORE = [("sampled", "DP=2"), ("sampled", "PP=2"), ("top_k", "TP=2, SP"), ("hidden", "TP=2, SP")]
CELLS = [*FEW, *(pytest.param(*each, marks=pytest.mark.long) for each in MORE)]


@pytest.fixture(scope="module")
def two():
    with Gloo(2, init=False, timeout=590) as group:
        yield group


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Write `sampled`, `top_k` and `hidden`, of 24 windows each."""
    root = tmp_path_factory.mktemp("stores")
    write_store(root / "sampled", manifest_of("sampled", **SHAPE, temperature=2.0))
    write_store(root / "top_k", manifest_of("top_k", **SHAPE, documents_apart=True))
    write_store(root / "hidden", manifest_of("hidden", **SHAPE))
    write_hf(root / "experts", "qwen3_moe", seed=4, width=32, layers=2)
    return root


@pytest.fixture(scope="module")
def expected(inputs, stores, two, tmp_path_factory):
    """Return {codec: metrics of the run on one process}."""
    root, known = tmp_path_factory.mktemp("one"), {}

    def found(codec):
        if codec not in known:
            two.run(train, inputs, stores / codec, root / codec, "one", FITTING[codec])
            known[codec] = metrics(root / codec)
        return known[codec]

    return found


def train(inputs, store, output, layout, changes):
    """Train from a store, beside token files, on the ranks that the layout needs."""
    from distill_nemo.training.entry import run_config

    processes = 1 if layout == "one" else 2
    if int(os.environ["RANK"]) >= processes:
        return
    run = tiny_run(inputs, output, steps=4, eval_interval=2)
    run.teacher = None
    run.training.micro_batch_size = 1 if layout in ("DP=2", "PP=2", "EP=2") else 2
    run.data.train = ["3", str(store), "1", str(inputs / "train")]
    run.data.valid = [str(store)]
    run.checkpoint.save_interval = 2
    changed(run, {f"parallelism.{name}": size for name, size in LAYOUTS[layout].items()} | changes)
    everyone, os.environ["WORLD_SIZE"] = os.environ["WORLD_SIZE"], str(processes)
    try:
        run_config(run)
    finally:
        os.environ["WORLD_SIZE"] = everyone


@pytest.mark.parametrize(("codec", "layout"), CELLS)
def test_a_run_from_a_store_is_the_same_at_every_layout(inputs, stores, two, expected, tmp_path, codec, layout):
    two.run(train, inputs, stores / codec, tmp_path, layout, FITTING[codec])
    worst = differences(metrics(tmp_path), expected(codec))
    print(worst)
    assert max(worst.values()) <= TOLERANCE and {"logit_loss", "lm_loss"} <= worst.keys()


def test_experts_on_two_ranks_learn_from_a_store_as_on_one(inputs, stores, two, tmp_path):
    fitting = FITTING["sampled"] | {"student.checkpoint": str(stores / "experts")}
    for layout in ("one", "EP=2"):
        two.run(train, inputs, stores / "sampled", tmp_path / layout, layout, fitting)
    worst = differences(metrics(tmp_path / "EP=2"), metrics(tmp_path / "one"))
    assert max(worst.values()) <= TOLERANCE and {"logit_loss", "forward_kl"} <= worst.keys(), worst


def refused(inputs, store, output):
    """Return the reason why a run is refused, and how often this rank has looked at all files of its stores."""
    from distill_nemo.teacher_store.reader import TeacherStore

    looked, check = [], TeacherStore.check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherStore, "check", lambda store: looked.append(store.path) or check(store))
        with pytest.raises(ValueError) as raised:
            train(inputs, store, output, "DP=2", FITTING["sampled"])
    return str(raised.value), len(looked)


def test_one_rank_looks_at_every_shard_and_tells_all(inputs, stores, two, tmp_path):
    shutil.copytree(stores / "sampled", tmp_path / "store")
    (tmp_path / "store" / shard_name(2)).unlink()
    (first, once), (second, never) = two.run(refused, inputs, tmp_path / "store", tmp_path / "out")
    assert (once, never) == (1, 0) and first == second
    assert first.startswith("data.train: ") and f"{shard_name(2)} is missing; write the store again" in first


def test_resumed_equals_uninterrupted_and_another_store_is_another_run(inputs, stores, two, expected, tmp_path):
    store, output, fitting = tmp_path / "store", tmp_path / "out", FITTING["sampled"]
    shutil.copytree(stores / "sampled", store)
    two.run(train, inputs, store, output, "one", {**fitting, "training.steps": 2, "optimizer.decay_steps": 4})
    store = store.rename(tmp_path / "moved")
    two.run(train, inputs, store, output, "one", {**fitting, "optimizer.decay_steps": 4})
    assert metrics(output) == expected("sampled")
    recorded = json.loads((output / "checkpoints" / "step_00000004" / "run.json").read_text())["contents"]
    assert len(recorded["data.train"]) == 64 and recorded["data.valid"] != recorded["data.train"]

    shard = store / shard_name(1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"damaged, by the sums in their manifest: {shard}; write the store again"):
        two.run(train, inputs, store, output, "DP=2", fitting)
    shutil.rmtree(store)
    write_store(store, manifest_of("sampled", **SHAPE, temperature=2.0, seed=2))
    with pytest.raises(ValueError, match=r"data\.train: .* holds other contents than when the run began"):
        two.run(train, inputs, store, output, "one", fitting)

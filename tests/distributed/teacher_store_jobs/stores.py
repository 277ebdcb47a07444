"""A tiny corpus, teachers and config of a store, and functions that write and read one in processes of a test."""

import os
import time
from pathlib import Path

import numpy as np

from distill_nemo.config import CorpusConfig, ParallelismConfig, StoreConfig, TeacherConfig
from tests.tiny_models import write_hf
from tests.token_files import write_documents

LENGTH, VOCAB = 16, 507


def write_corpus(root):
    """Write short documents of random tokens, of which some do not count, and two teachers."""
    random = np.random.RandomState(5)
    documents = [random.randint(0, VOCAB, random.randint(4, 40)) for _ in range(90)]
    write_documents(root / "train", documents)
    num_tokens = sum(map(len, documents))
    Path(f"{root}/train.mask").write_bytes(np.packbits(random.rand(num_tokens) < 0.7, bitorder="little").tobytes())
    write_hf(root / "teacher", "llama", layers=2)
    write_hf(root / "moe", "qwen3_moe", seed=3, layers=2)


def tiny_store(corpus, output, teacher="teacher", **fields):
    """Return the writing of 13 windows, in shards of 3, with documents apart."""
    data = CorpusConfig([str(corpus / "train")], sequence_length=LENGTH, reset_at_documents=True)
    settings = {"windows": 13, "shard_windows": 3, "micro_batch_size": 2, "draws": 12, "dtype": "float32"} | fields
    return StoreConfig(
        str(output), TeacherConfig(checkpoint=str(corpus / teacher) if teacher else None), data, **settings
    )


def at(config, **sizes):
    """Return the config at another layout."""
    config.parallelism = ParallelismConfig(**{f"{name}_parallel_size": size for name, size in sizes.items()})
    return config


def write(config):
    """Write a store. Needs a process of each rank."""
    from distill_nemo.teacher_store_jobs.write import run_store

    assert run_store(config) is None


def verify(config):
    """Verify a store. Needs a process of each rank."""
    from distill_nemo.teacher_store_jobs.verify import run_verify

    run_verify(config)


def write_alone(config):
    """Write a store as a job of one process, whatever else this process belongs to. Return the signal that stopped it.

    Each process of a group is then a job of its own.
    """
    from distill_nemo.teacher_store_jobs.write import run_store

    there = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    try:
        return run_store(config)
    finally:
        os.environ.update(there)


def interrupted(config, number, *moments):
    """Write in children that get a signal once as many shards are there as each moment says, then in one that ends.

    Return how each child ended: the signal that killed it, negative, or its exit code.
    """
    return [_child(config, number, moment) for moment in (*moments, None)]


def _child(config, number, moment):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = write_alone(config) or 0
        finally:
            os._exit(code)
    signalled = moment is None
    while True:
        ended, status = os.waitpid(pid, 0 if signalled else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if len(list(Path(config.output).glob("shard-*.safetensors"))) >= moment:
            os.kill(pid, number)
            signalled = True
        time.sleep(0.001)


def contents(store):
    """Return the bytes of every file by name, but for the hashes of files elsewhere."""
    return {path.name: path.read_bytes() for path in sorted(Path(store).iterdir()) if path.name != "hashes.json"}


def windows(store):
    """Return all windows of a store, with the targets of all tokens that count one after another."""
    from distill_nemo.teacher_store.reader import TeacherStore

    opened = TeacherStore(store)
    found = [opened.window(number) for number in range(len(opened))]
    of_windows = ("tokens", "loss_mask", "document_starts")
    joined = {name: (np.stack if name in of_windows else np.concatenate)([x[name] for x in found]) for name in found[0]}
    return joined

"""The job that writes a store: rounds in which every replica of the teacher takes a shard that is missing.

Replicas are the data-parallel ranks. Expert parallelism crosses them, so all run equally many micro batches. A
replica's writer is one rank of its last pipeline stage. It holds the lock of a shard from the claim until the shard is
whole, and writes it beside the next round. Several jobs may write on one store: a shard that another one holds is
passed over, and taken if that job dies.
"""

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core import parallel_state
from torch.utils.data import Dataset

from distill_nemo.checkpoint.hub_models import on_this_machine
from distill_nemo.checkpoint.identity import remember_hashes
from distill_nemo.checkpoint.load import check_whole
from distill_nemo.checks import check_job
from distill_nemo.config import StoreConfig, TrainingConfig
from distill_nemo.config_files import from_dict, to_dict
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.datasets import build_datasets, check_micro_batch, check_number_of_samples
from distill_nemo.data.token_files import check_vocabulary, documents_apart
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.resolve import resolve
from distill_nemo.models.source_check import refusal_of_sources
from distill_nemo.runtime.device import resolve_dtype, setup_device
from distill_nemo.runtime.everyone import AgreedError, Everyone
from distill_nemo.runtime.orphans import end_with_torchrun
from distill_nemo.runtime.process_groups import (
    is_joined,
    of_all_ranks,
    process_groups,
    raise_everywhere,
    rank,
    world_size,
)
from distill_nemo.runtime.seed import seed_everything
from distill_nemo.runtime.signals import StopSignal, keep_early_sigurg
from distill_nemo.runtime.watchdog import Watchdog, heartbeat
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import OUTPUT_LAYER, Manifest
from distill_nemo.teacher_store.output_layer import write_output_layer
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import (
    ShardWriter,
    WrittenShards,
    claim_shard,
    create_store,
    finish_store,
    is_complete,
)
from distill_nemo.teacher_store_jobs.background import Background
from distill_nemo.teacher_store_jobs.manifest import identifying_files, manifest_of
from distill_nemo.teacher_store_jobs.progress import StoreProgress
from distill_nemo.teacher_store_jobs.targets import encode_chunk, window_of, with_uniforms
from distill_nemo.teacher_store_jobs.teacher_run import Sample, TeacherRun
from distill_nemo.training.data import check_tokenizers
from distill_nemo.training.entry import fitted

POLL_SECONDS = 1.0  # while other jobs write the last shards
PIECE_TOKENS = 2**18  # of a shard, whose targets are in host memory at a time, before they are packed
INDEX_CACHE = "index_cache"  # of the samples' order; removed from a complete store


def run_store(config: StoreConfig) -> int | None:
    """Write a store on this rank. Return the signal that stopped it, or None once the store is complete.

    Raises:
        ValueError: for a config that cannot run, a teacher that transformers reads differently, or another store.
        OSError: if the store cannot be written.
    """
    keep_early_sigurg()
    end_with_torchrun()
    config = from_dict(to_dict(config), StoreConfig)  # a copy, with checked types
    check_job(config, world_size())
    setup_device()
    config = on_this_machine(config)
    setting = config.data.sequence_length, documents_apart(config.data), config.parallelism
    model = fitted("teacher", resolve(config.teacher), *setting)
    config = replace(config, teacher=model.filled(config.teacher))
    check_job(config, world_size())
    asks = not is_complete(Path(config.output)) and (rank() == 0 or is_joined())
    refusal = refusal_of_sources(model) if asks else None
    with process_groups(config.parallelism):
        raise_everywhere(refusal)
        with StopSignal() as stop, Watchdog(config.parallelism.timeout_minutes * 60):
            stopped = _write(config, model, stop)
    if stopped and rank() == 0:
        print(f"stopped by signal {stopped}; whole shards are kept; the same command goes on", flush=True)
    return stopped


def _write(config: StoreConfig, model: Architecture, stop: StopSignal) -> int | None:
    heartbeat("starting", watched=False)
    device, dtype, store = setup_device(), resolve_dtype(config.dtype), Path(config.output)
    require(
        device.type == "cuda" or dtype == torch.float32,
        f'dtype = "{config.dtype}" needs a GPU, and there is none; set it to "float32" or "auto"',
    )
    everyone = Everyone()
    everyone.on_rank_0(partial(_check_data, config, model))
    complete = everyone.on_rank_0(lambda: is_complete(store))
    if not complete:
        check_whole(config.teacher.checkpoint)
    manifest = manifest_of(config, model, dtype)
    size = min(config.micro_batch_size, manifest.largest_shard)
    everyone.on_rank_0(partial(check_micro_batch, "micro_batch_size", size, manifest.sequence_length))
    everyone.on_rank_0(lambda: _begin(config, manifest))
    if complete:
        everyone.on_rank_0(lambda: print(f"{store} is complete: {_summary(store)}", flush=True))
        return None
    seed_everything(0)
    encoder = partial(encode_chunk, manifest)
    run = TeacherRun(model, config.parallelism, dtype, size, encoder)
    if manifest.codec == "hidden" and not everyone.on_rank_0((store / OUTPUT_LAYER).is_file):
        everyone.raise_errors(_output_layer_error(store, manifest, run))
    cache, training = Path(config.data.cache or store / INDEX_CACHE), TrainingConfig(seed=config.seed)
    samples, _ = build_datasets(config.data, training, cache, manifest.num_windows, 0, model.vocab_size)
    with Background() as background, Rounds(store, manifest, run, samples, background, everyone) as rounds:
        stopped = rounds.write(stop)
        background.wait()
    if stopped is None:
        everyone.on_rank_0(partial(_finish, store))
    return stopped


def _output_layer_error(store: Path, manifest: Manifest, run: TeacherRun) -> Exception | None:
    """Write the output layer on the rank that has it. Return the reason if it could not. Every rank calls it."""
    weight_VH = run.output_weight()
    try:
        if weight_VH is not None:
            write_output_layer(store, manifest, weight_VH, None)
    except OSError as error:
        return OSError(f"{store / OUTPUT_LAYER} could not be written: {error}; free space, then run the same command")
    return None


def _check_data(config: StoreConfig, model: Architecture) -> None:
    check_corpora(config.data)
    check_number_of_samples(f"windows = {config.windows}", config.windows or 0)
    check_vocabulary(config.data, model.vocab_size)
    check_tokenizers(config.data, {"teacher": config.teacher.checkpoint}, model)


def _begin(config: StoreConfig, manifest: Manifest) -> None:
    """Create the store or check it, and keep the hashes in it: the same command then reads neither teacher nor data."""
    create_store(Path(config.output), manifest)
    files, sums = identifying_files(config)
    remember_hashes(files, Path(config.output), sums)


def _finish(store: Path) -> None:
    finish_store(store)
    shutil.rmtree(store / INDEX_CACHE, ignore_errors=True)
    print(f"wrote {store}: {_summary(store)}", flush=True)


def _summary(store: Path) -> str:
    whole = TeacherStore(store)
    whole.check()
    num_bytes = sum(path.stat().st_size for path in whole.sums)
    return (
        f"{len(whole):,} windows, {whole.num_tokens:,} tokens with targets, {num_bytes / 1e6:,.1f} MB "
        f"({num_bytes / max(whole.num_tokens, 1):.1f} bytes for each)"
    )


@dataclass
class ReplicaState:
    """One rank's part of the agreement before a round."""

    replica: int
    shard: int | None  # that its writer has claimed
    error: str | None
    signal: int | None


def assign(states: list[ReplicaState], before: Collection[int]) -> dict[int, int]:
    """Return the shard of each replica that has one: one that no lower rank has, and not of the round before.

    Locks see to it already, but some file systems have none.
    """
    shards: dict[int, int] = {}
    for state in states:
        if state.shard is not None and state.shard not in (*shards.values(), *before):
            shards[state.replica] = state.shard
    return shards


class Rounds:
    """Rounds of one job. Every rank has one, and calls `write`.

    Args:
        store: directory.
        manifest: of the store.
        run: the teacher.
        samples: windows of the store, by number.
        background: where this rank's shards are written.
        everyone: all ranks.
    """

    def __init__(
        self,
        store: Path,
        manifest: Manifest,
        run: TeacherRun,
        samples: Dataset[Sample],
        background: Background,
        everyone: Everyone,
    ) -> None:
        self.store, self.manifest, self.run, self.samples = store, manifest, run, samples
        self.background, self.everyone = background, everyone
        self.replica = parallel_state.get_data_parallel_rank()
        self.num_replicas = parallel_state.get_data_parallel_world_size()
        self._written = WrittenShards(store, manifest)  # rank 0 looks for all
        self._left: deque[int] = deque()  # missing shards that this replica tries to claim
        self._writer: ShardWriter | None = None  # of the shard that this rank has claimed
        self._error: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, stop: StopSignal) -> int | None:
        """Write shards until none is missing. Return the signal that stopped this job, or None."""
        shards: dict[int, int] = {}
        if not self._look():
            return None
        progress = StoreProgress(self.manifest, self._written) if rank() == 0 else None
        while True:
            states = self._agree(stop)
            _raise_first([state.error for state in states])
            stopped = max(state.signal or 0 for state in states)
            shards = assign(states, shards.values())
            if self._writer is not None and self.replica not in shards:
                self._leave()
            if stopped:
                return stopped
            if shards:
                self._round(shards)
            if len(shards) < self.num_replicas and not self._look():
                return None
            if not shards:
                time.sleep(POLL_SECONDS)
            if progress:
                progress.show()

    def _look(self) -> bool:
        """Look for shards that are missing, on rank 0, and give each replica its share. Return True if there are any.

        Every rank calls it.
        """
        heartbeat("looking for missing shards", watched=False)
        missing = self.everyone.on_rank_0(self._written.missing)
        self._left = deque(missing[self.replica :: self.num_replicas])
        return bool(missing)

    def _agree(self, stop: StopSignal) -> list[ReplicaState]:
        """Claim a shard for this replica, and return the states of all ranks. One all-gather."""
        heartbeat("agreeing on shards", watched=False)
        if self.run.is_writer and not stop.received and self._error is None:
            with self._keeping_errors():
                self._writer = self._claim()
        shard = None if self._writer is None else self._writer.shard
        return of_all_ranks(ReplicaState(self.replica, shard, self._error, stop.received))

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """Keep an error of this rank's shards until the next agreement."""
        try:
            yield
        except ValueError as error:
            self._error = str(error)
        except OSError as error:
            free = shutil.disk_usage(self.store).free / 2**30
            self._error = (
                f"{self.store} could not be written ({free:.2f} GiB free): {error}. Whole shards are kept; free space, "
                "then run the same command again"
            )

    def _claim(self) -> ShardWriter | None:
        """Return the writer of a missing shard, or None."""
        while self._left:
            writer = claim_shard(self.store, self.manifest, self._left.popleft())
            if writer is not None:
                return writer
        self.background.wait()  # for the shard that this rank writes, so that it is not looked for
        return None

    def _leave(self) -> None:
        """Let go of a shard that another replica writes. Where files have locks, this replica would not have it."""
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        with self._keeping_errors():
            self.background.wait()  # so only shards of the round before are being written

    def _round(self, shards: dict[int, int]) -> None:
        """Run the teacher on the shards by replica, piece by piece, and begin to write this one's."""
        size = self.run.micro_batch_size
        piece = max(PIECE_TOKENS // (self.manifest.sequence_length * size), 1) * size
        longest = max(len(self.manifest.windows_of(shard)) for shard in shards.values())
        own = self.manifest.windows_of(shards[self.replica]) if self.replica in shards else range(0)
        for first in range(0, longest, piece):
            stop = min(first + piece, longest)
            samples = self._read(own[first:stop] or range(1))  # without an own window, one of which nothing is kept
            targets = self.run.encode(samples, -(-(stop - first) // size))
            if self._writer is not None and first < len(own):
                self._beside(self._append, self._writer, samples, targets)
        if self._writer is not None:
            self._beside(self._commit, self._writer)
            if self._error is None:
                self._writer = None  # which is closed once it is written

    def _read(self, numbers: range) -> list[Sample]:
        """Return windows with the random numbers of their draws; if a rank cannot read its own, all ranks raise."""
        error, samples = None, []
        try:
            samples = [with_uniforms(self.samples[number], self.manifest.seed, number) for number in numbers]
        except (OSError, ValueError) as failure:
            error = str(failure)
        _raise_first(of_all_ranks(error))
        return samples

    def _beside(self, step: Callable[..., None], *arguments: Any) -> None:
        """Do a step of this rank's shard beside the teacher, after the step before, unless one has failed."""
        if self._error is None:
            with self._keeping_errors():
                self.background.start(step, *arguments)

    def _append(self, writer: ShardWriter, samples: list[Sample], targets: list[Arrays]) -> None:
        for sample, found in zip(samples, targets, strict=True):
            writer.append(window_of(sample, found, self.manifest.documents_apart))

    def _commit(self, writer: ShardWriter) -> None:
        with writer:
            writer.commit()


def _raise_first(errors: list[str | None]) -> None:
    """Raise the first rank's error, which every rank has learnt."""
    for number, error in enumerate(errors):
        if error is not None:
            raise AgreedError(f"rank {number}: {error}")

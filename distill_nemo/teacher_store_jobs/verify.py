"""Verify a store: every checksum, and the teacher's own answer for a sample of windows.

The windows are evenly spread over the store, in the micro batches in which they were written.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from distill_nemo.checkpoint.hub_models import on_this_machine
from distill_nemo.checkpoint.load import check_whole
from distill_nemo.checks import check_job
from distill_nemo.config_files import from_dict, to_dict
from distill_nemo.data.stored_windows import StoredWindows
from distill_nemo.fields import first_few, require
from distill_nemo.job_config import VerifyConfig
from distill_nemo.models.resolve import resolve
from distill_nemo.models.source_check import refusal_of_sources
from distill_nemo.runtime.checksums import sha256
from distill_nemo.runtime.device import resolve_dtype, setup_device
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
from distill_nemo.runtime.watchdog import Watchdog, heartbeat
from distill_nemo.teacher_store.manifest import Manifest, shard_name
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store_jobs.agreement import Agreement, encode_and_count
from distill_nemo.teacher_store_jobs.targets import with_uniforms
from distill_nemo.teacher_store_jobs.teacher_run import TeacherRun
from distill_nemo.training.entry import fitted


def run_verify(config: VerifyConfig) -> None:
    """Verify a store on this rank.

    Raises:
        ValueError: for a store that is not complete, a teacher that does not fit; or naming the shards that are
            damaged, or that the teacher does not write.
    """
    end_with_torchrun()
    config = from_dict(to_dict(config), VerifyConfig)
    check_job(config, world_size())
    setup_device()
    store = TeacherStore(config.store)
    manifest = store.manifest
    config.teacher.checkpoint = config.teacher.checkpoint or manifest.checkpoint
    config = on_this_machine(config) if config.samples else config
    model = refusal = None
    if config.samples:
        setting = manifest.sequence_length, manifest.documents_apart, config.parallelism
        model = fitted("teacher", resolve(config.teacher), *setting)
        require(
            model.vocab_size == manifest.vocab_size,
            f"{model.name} has {model.vocab_size:,} ids, and the teacher of {store.path} has {manifest.vocab_size:,}: "
            "name the store's own teacher as teacher.checkpoint",
        )
        refusal = refusal_of_sources(model) if rank() == 0 or is_joined() else None
    with process_groups(config.parallelism), Watchdog(config.parallelism.timeout_minutes * 60):
        raise_everywhere(refusal)
        _raise_together([f"{path.name} is damaged: {wrong}" for path, wrong in _damages(store)], store)
        _print(f"{store.path}: {manifest.num_shards:,} shards, every checksum holds")
        if model is not None:
            check_whole(config.teacher.checkpoint)
            seed_everything(0)
            dtype, encoder = resolve_dtype(manifest.dtype), partial(encode_and_count, manifest)
            size = min(config.micro_batch_size, manifest.largest_shard)
            run = TeacherRun(model, config.parallelism, dtype, size, encoder)
            _ask_again(store, run, config.samples)


def _damages(store: TeacherStore) -> list[tuple[Path, str]]:
    """Return this rank's share of the files that are not as the manifest says."""
    found = []
    for path, expected in list(store.sums.items())[dist.get_rank() :: dist.get_world_size()]:
        heartbeat("hashing shards")
        try:
            if sha256(path) != expected:
                found.append((path, "its SHA-256 is another"))
        except OSError as error:
            found.append((path, str(error)))
    return found


def _raise_together(problems: list[str], store: TeacherStore) -> None:
    """Raise on every rank if any has a problem. One all-gather."""
    found = sorted(problem for each in of_all_ranks(problems) for problem in each)
    if found:
        raise ValueError(f"{store.path}: {'; '.join(first_few(found))}")


def _ask_again(store: TeacherStore, run: TeacherRun, samples: int) -> None:
    """Run the teacher on a sample of windows, and compare.

    Raises:
        ValueError: naming the shards that differ.
    """
    manifest, replicas = store.manifest, parallel_state.get_data_parallel_world_size()
    stored, batches = (
        StoredWindows(str(store.path), with_targets=True),
        _micro_batches(manifest, run.micro_batch_size, samples),
    )
    rounds = -(-len(batches) // replicas)
    found: dict[int, Agreement] = {}
    for number in range(rounds):
        place = number * replicas + parallel_state.get_data_parallel_rank()
        windows = batches[min(place, len(batches) - 1)]
        answers = run.encode([with_uniforms(stored[window], manifest.seed, window) for window in windows], 1)
        if answers and place < len(batches):
            agreement = found.setdefault(windows[0] // manifest.windows_per_shard, Agreement(manifest))
            for answer, window in zip(answers, windows, strict=True):
                agreement.add(answer, store.window(window))
    wrong = {shard_name(shard): each.problem() for shard, each in found.items()}
    _raise_together([f"{name} is not the teacher's: {why}" for name, why in wrong.items() if why], store)
    agreements = of_all_ranks(list(found.values()))
    _print(sum((each for part in agreements for each in part), Agreement(manifest)).summary())


def _micro_batches(manifest: Manifest, size: int, samples: int) -> list[range]:
    """Return the windows of evenly spread micro batches, in all about `samples`."""
    shards = map(manifest.windows_of, range(manifest.num_shards))
    all_ = [shard[i : i + size] for shard in shards for i in range(0, len(shard), size)]
    chosen = np.unique(np.linspace(0, len(all_) - 1, min(-(-samples // size), len(all_))).round().astype(int))
    return [all_[i] for i in chosen]


def _print(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)

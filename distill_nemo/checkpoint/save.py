"""Write checkpoints so that a crash at any point leaves the previous one whole."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from distill_nemo.checkpoint.directory import delete, point_latest_at, prune, step_directory
from distill_nemo.checkpoint.identity import run_record
from distill_nemo.checkpoint.state import RANDOM_STATE, random_state, rng_layout, sharded_state
from distill_nemo.checkpoint.write_results import WriteResults
from distill_nemo.config import RunConfig
from distill_nemo.models.checkpoints.modelopt_state import save_modelopt_state
from distill_nemo.models.sources import QUANTIZATION, candidates
from distill_nemo.quantization import is_quantized
from distill_nemo.runtime.checksums import join_sums, sum_own_files, then_sum_own_files
from distill_nemo.runtime.files import fsync, remove_directory


class CheckpointWriter:
    """Writer of `step_*` directories: as `.partial` first, then renamed, then named in `latest`."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.root, self.record = root, run_record(config, remember=True)
        self.keep_last, self.async_save = config.checkpoint.keep_last, config.checkpoint.async_save
        self.benchmark_interval = config.training.benchmark_interval
        self._queue: Any = AsyncCallsQueue() if self.async_save else None
        self.quantization = self.record["quantization"] if is_quantized(config.quantization) else None
        self._partial = root  # directory being written
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = WriteResults()  # in place of Megatron's helper process

    def save(self, step: int, chunks: list[Any], optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint. Collective: every rank must call it. With `async_save` it is whole only after `finish`.

        Raises:
            OSError: if it cannot be written; the previous one stays the newest.
        """
        self.finish(blocking=True)
        target = step_directory(self.root, step)
        self._partial = partial = target.with_name(target.name + ".partial")
        with self._naming_the_last_good():
            if dist.get_rank() == 0:
                remove_directory(partial)
                partial.mkdir(parents=True)
            dist.barrier()
            contents = sharded_state(chunks, optimizer, scheduler, loading=False)
            contents |= {RANDOM_STATE: random_state(), "run_state": state, "rng_layout": rng_layout()[0]}
            save_modelopt_state(chunks[0], partial)
            self._write(contents, partial, target)

    def _write(self, contents: dict[str, Any], partial: Path, target: Path) -> None:
        request = dist_checkpointing.save(
            contents,
            str(partial),
            async_sharded_save=self.async_save,
            async_strategy="mcore",  # the default needs nvidia-resiliency-ext
        )
        if request is None:
            sum_own_files(partial, dist.get_rank())
            dist.barrier()
            self._publish(partial, target)
            return
        if request.async_fn is not None:
            request = request._replace(async_fn=then_sum_own_files(request.async_fn, partial, dist.get_rank()))
        request.add_finalize_fn(lambda: self._publish(partial, target))
        self._queue.schedule_async_request(request)

    def finish(self, blocking: bool) -> None:
        """Publish a background save that is done; wait for it if `blocking`. Collective: every rank must call it.

        Raises:
            OSError: as `save`.
        """
        if self._queue is not None:
            with self._naming_the_last_good():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for a save under way and end the writers."""
        self.finish(blocking=True)
        if self._queue is not None:
            self._queue.close()

    def _publish(self, partial: Path, target: Path) -> None:
        if dist.get_rank() == 0:
            architecture = {**self.record["student"], "checkpoint": None}
            if self.quantization is not None:
                architecture[QUANTIZATION] = self.quantization
            (partial / "architecture.json").write_text(json.dumps(architecture, indent=2))
            (partial / "run.json").write_text(json.dumps(self.record, indent=2))
            join_sums(partial)
            if target.is_dir():  # of a run that was resumed at an earlier step
                delete(target)
            partial.rename(target)
            fsync(self.root.parent)
            fsync(self.root)
            point_latest_at(target)
            prune(target, self.keep_last, self.benchmark_interval)
        dist.barrier()

    @contextlib.contextmanager
    def _naming_the_last_good(self) -> Iterator[None]:
        """Remove a checkpoint that cannot be written, and name the newest whole one in the error.

        If one rank cannot write, Megatron raises torch's CheckpointException, a BaseException, on every rank.
        """
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:  # torch.save raises RuntimeError on a full disk
            if dist.get_rank() == 0:
                remove_directory(self._partial)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            there = next(path for path in self._partial.absolute().parents if path.exists())
            free, good = shutil.disk_usage(there).free / 2**30, next(iter(candidates(self.root)), "none")
            raise OSError(
                f"checkpoint {self._partial} could not be written ({free:.2f} GiB free): {lines[-1]}. "
                f"The last good one: {good}; free space and run the same command again"
            ) from error

"""Write checkpoints so that a crash at any point leaves the last one good."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from distill_nemo.checkpoint.directory import latest, point_latest_at, prune, step_directory
from distill_nemo.checkpoint.state import rng_layout, rng_state, sharded_state
from distill_nemo.config import RunConfig, to_dict


class CheckpointWriter:
    """Writes `step_*` directories: into `.partial`, then renamed, then named by the tracker."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.root, self.config = root, to_dict(config)
        self.keep_last, self.async_save = config.checkpoint.keep_last, config.checkpoint.async_save
        self._queue: Any = AsyncCallsQueue() if self.async_save else None

    def save(self, step: int, model: Any, optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
        """Write one checkpoint; every rank must call it. With `async_save` it is whole only after `finish`.

        Raises:
            OSError: when it cannot be written; the one before stays the newest.
        """
        self.finish(blocking=True)
        target = step_directory(self.root, step)
        partial = target.with_name(target.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        contents = sharded_state(model, optimizer, scheduler, loading=False)
        contents |= {"rng": rng_state(), "run_state": state, "rng_layout": rng_layout()[0]}
        self._all_or_none(partial, lambda: self._write(contents, partial, target))

    def _write(self, contents: dict[str, Any], partial: Path, target: Path) -> None:
        request = dist_checkpointing.save(
            contents,
            str(partial),
            async_sharded_save=self.async_save,
            async_strategy="mcore",  # the default needs nvidia-resiliency-ext
        )
        if request is None:
            return self._publish(partial, target)
        request.add_finalize_fn(lambda: self._publish(partial, target))
        self._queue.schedule_async_request(request)
        return None

    def finish(self, blocking: bool) -> None:
        """Publish what was written in the background, waiting for it when `blocking`."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for what is being written and end the writers."""
        self.finish(blocking=True)
        if self._queue is not None:
            self._queue.close()

    def _publish(self, partial: Path, target: Path) -> None:
        if dist.get_rank() == 0:
            architecture = {**self.config["student"], "checkpoint": None}
            (partial / "architecture.json").write_text(json.dumps(architecture, indent=2))
            (partial / "run.json").write_text(json.dumps(self.config, indent=2))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            point_latest_at(target)
            prune(self.root, self.keep_last)
        dist.barrier()

    def _all_or_none(self, partial: Path, write: Any) -> None:
        """Run `write` on all ranks; when it fails on any, say so with the last good checkpoint named."""
        try:
            write()
        except Exception as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            good = latest(self.root)
            raise OSError(
                f"checkpoint {partial} could not be written: {error}. The last good one: {good or 'none'}; free space "
                "and run the same command again"
            ) from error

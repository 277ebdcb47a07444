"""The training loop: step, evaluate, save, and stop on a signal."""

import gc
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer
from distill_nemo.checkpoint.directory import checkpoint_root
from distill_nemo.checkpoint.hub_models import named
from distill_nemo.checkpoint.save import CheckpointWriter
from distill_nemo.config import RunConfig
from distill_nemo.config_files import to_dict
from distill_nemo.data.samplers import batches
from distill_nemo.evaluation import Report, StepFunc, evaluate, reduce_reports
from distill_nemo.models.distillation.objective import objective_of
from distill_nemo.runtime.process_groups import of_all_ranks, rank
from distill_nemo.runtime.signals import StopSignal
from distill_nemo.runtime.watchdog import Watchdog, heartbeat
from distill_nemo.training.forward_step import forward_step
from distill_nemo.training.metrics import MetricsLog
from distill_nemo.training.setup import TrainState

MAX_SKIPPED = 10  # steps in a row


class NotFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


def _ranks_not_finite(reports: list[Report]) -> str:
    """Name the ranks whose own losses are not finite. Collective: every rank must call it."""
    mine = all(bool(value.isfinite().all()) for report in reports for value in report.values())
    ranks = [str(rank) for rank, ok in enumerate(of_all_ranks(mine)) if not ok]
    return f", losses of rank {', '.join(ranks)}" if ranks else ", losses of every rank finite"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on any rank's GPU; None on CPU. Collective: every rank must call it."""
    if device.type != "cuda":
        return None
    most = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


class Clock:
    """Total of the seconds spent inside `with clock:`."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.monotonic() - self._began

    def take(self) -> float:
        """Return the total and reset it."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def waiting(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the same items and add the time of waiting for them."""
        while True:
            with self:
                item = next(items, None)
            if item is None:
                return
            yield item


class Loop:
    """Training on one rank. `run` returns the signal that stopped it, or None after the last step."""

    def __init__(
        self, config: RunConfig, train_state: TrainState, datasets: tuple[Any, Any], device: torch.device
    ) -> None:
        self.config, self.train_state, self.device = config, train_state, device
        self.train_data, self.valid_data = datasets
        self.state: dict[str, Any] = {"step": 0, "consumed_samples": 0, "tokens": 0}
        self.writer = CheckpointWriter(checkpoint_root(config.output_dir), config)
        self.skipped = 0  # steps in a row
        self.data_clock, self.save_clock = Clock(), Clock()
        self.num_microbatches = config.num_microbatches(parallel_state.get_data_parallel_world_size())

    def run(self) -> int | None:
        """Train from `state` to the last step. Collective: every rank must call it."""
        resumed, steps = self.state["step"], self.config.training.steps
        where, parameters = Path(self.config.output_dir), to_dict(named(self.config))
        log = MetricsLog(where, self.config.logging, steps, resumed, rank() == 0, parameters)
        log.start({"step": resumed, "world_size": torch.distributed.get_world_size(), "device": _device_name()})
        gc.collect()
        gc.freeze()  # or each collection would look at the models, too
        try:
            with StopSignal() as stop, Watchdog(self.config.parallelism.timeout_minutes * 60):
                try:
                    stopped = self._train(log, stop)
                except NotFiniteError as error:  # on all ranks; a save under way is of an earlier, good step
                    try:
                        self._close_writer()
                    except OSError as unsaved:
                        raise NotFiniteError(f"{error}. {unsaved}") from error
                    raise
                self._close_writer()
                stopped = stopped or stop.requested(self.device)
            if self.state["step"] > resumed:
                peak = _peak_memory(self.device)
                log.end({"step": self.state["step"], "save_seconds": self.save_clock.take(), "peak_memory": peak})
        finally:
            log.close()
            gc.unfreeze()
        return stopped

    def _train(self, log: MetricsLog, stop: StopSignal) -> int | None:
        train, save, stopped = self.config.training, self.config.checkpoint, None
        self._set_losses()
        self._observe()
        iterators = self.batches(self.train_data, self.state["consumed_samples"])
        if self.state["step"] == 0 and self.valid_data is not None:
            log.evaluation(self._held_out())
        while self.state["step"] < train.steps and not stopped:
            self._log_step(log, self.step(iterators))
            step = self.state["step"]
            if self.valid_data is not None and (step % train.eval_interval == 0 or step == train.steps):
                log.evaluation(self._held_out())
            stopped = stop.requested(self.device)
            is_measured = train.benchmark_interval is not None and step % train.benchmark_interval == 0
            if step % save.save_interval == 0 or is_measured or step == train.steps or stopped:
                log.flush()  # a resumed run will not write these lines again
                self.save()
            with self.save_clock:
                self.writer.finish(blocking=False)
        return stopped

    def _close_writer(self) -> None:
        heartbeat("waiting for the last checkpoint", watched=False)
        with self.save_clock:
            self.writer.close()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        heartbeat(f"saving step {self.state['step']}", watched=False)
        t = self.train_state
        with self.save_clock:
            self.writer.save(self.state["step"], t.unwrapped, t.optimizer, t.scheduler, dict(self.state))

    def batches(self, dataset: Any, consumed: int) -> list[Iterator[dict[str, Tensor]]]:
        """Return the same stream of micro batches once for each chunk of this stage."""
        streams = [
            batches(
                dataset,
                consumed_samples=consumed,
                global_batch_size=self.config.training.global_batch_size,
                micro_batch_size=self.config.training.micro_batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                num_workers=self.config.data.num_workers,
            )
            for _ in self.train_state.chunks
        ]
        return [self.data_clock.waiting(stream) for stream in streams]

    def _set_losses(self) -> dict[str, float]:
        """Set weights and temperature of the coming step. Return those that have a schedule."""
        losses = self.config.distillation
        objectives = [objective_of(chunk) for chunk in self.train_state.unwrapped]
        if not losses.schedules or any(each.balancer is None for each in objectives):
            return {}
        now = losses.at(self.state["step"] + 1)
        for objective in objectives:
            objective.set_losses(now)
        return {name: getattr(now, name) for name in losses.schedules}

    def _observe(self, means: dict[str, float] | None = None) -> None:
        """Set a dynamic balancer's losses: the last step's means; at the start the saved ones, or the first batch's."""
        balancers = [objective_of(chunk).balancer for chunk in self.train_state.unwrapped]
        dynamic = [each for each in balancers if isinstance(each, LogitsAndIntermediatesLossBalancer)]
        if not dynamic:
            return
        losses: dict[str, float] = (
            means or self.state.get("observed") or self._evaluated(self.train_data, 1, forward_step)
        )
        for balancer in dynamic:
            balancer.observe(losses)
            self.state["observed"] = balancer.observed

    def step(self, iterators: list[Iterator[dict[str, Tensor]]]) -> dict[str, float]:
        """Take one optimizer step and return the global token means."""
        heartbeat(f"step {self.state['step'] + 1}")
        scheduled = self._set_losses()
        start, _ = time.monotonic(), self.data_clock.take()
        t: Any = self.train_state
        for chunk in t.chunks:
            if not chunk.training:
                chunk.train()
            chunk.zero_grad_buffer()
        t.optimizer.zero_grad()
        reports = self.forward_backward(iterators)
        updated, grad_norm, _ = t.optimizer.step()
        means = reduce_reports(reports, t.chunks)  # waits for the device, so last
        lr = t.optimizer.param_groups[0]["lr"]
        grad_norm = math.nan if grad_norm is None else float(grad_norm)
        if self._finite(means, reports, grad_norm, updated):
            self._observe(means)
        t.scheduler.step(increment=1)
        self.state["step"] += 1
        self.state["consumed_samples"] += self.config.training.global_batch_size
        self.state["tokens"] += int(means["valid_tokens"])
        seconds = {"seconds": time.monotonic() - start, "data_seconds": self.data_clock.take()}
        seconds["save_seconds"] = self.save_clock.take()
        return means | {"lr": lr, "grad_norm": grad_norm} | scheduled | seconds

    def forward_backward(self, iterators: list[Iterator[dict[str, Tensor]]]) -> list[Report]:
        """Run the micro batches of one step through Megatron's schedule, without synchronising with the device."""
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.train_state.chunks,
            num_microbatches=self.num_microbatches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=False,
        )

    def _finite(self, means: dict[str, float], reports: list[Report], grad_norm: float, updated: bool) -> bool:
        """Return True if losses and gradient norm are finite. All ranks agree.

        Raises:
            NotFiniteError: if not, unless `on_nan` is "skip"; then after `MAX_SKIPPED` steps in a row.
        """
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if not math.isfinite(grad_norm):
            bad.append("gradient norm")
        if updated and not bad:
            self.skipped = 0
            return True
        first = self.state["consumed_samples"]
        samples = f"samples {first} to {first + self.config.training.global_batch_size - 1}"
        problem = (
            f"step {self.state['step'] + 1}: {', '.join(bad) or 'update'} not finite{_ranks_not_finite(reports)} "
            f"({samples})"
        )
        self.skipped += 1
        if self.config.training.on_nan == "stop":
            raise NotFiniteError(
                f"{problem}. Nothing of it was saved; lower optimizer.lr, or set training.on_nan=skip to go on"
            )
        if self.skipped == MAX_SKIPPED:
            raise NotFiniteError(
                f"{problem}, the {MAX_SKIPPED}th step in a row; lower optimizer.lr, or look at the data"
            )
        if rank() == 0:
            result = "updated all the same, as the gradient is finite" if updated else "the update is skipped"
            print(f"warning: {problem}: {result}", file=sys.stderr, flush=True)
        return False

    def _log_step(self, log: MetricsLog, means: dict[str, float]) -> None:
        step, tokens = self.state["step"], means.pop("valid_tokens")
        line = {"step": step, **means, "tokens": self.state["tokens"]}
        line["tokens_per_second"] = tokens / means["seconds"]
        log.train(line, show=step % self.config.logging.log_interval == 0 or step == self.config.training.steps)

    def _held_out(self) -> dict[str, Any]:
        """Return metrics over the first `eval_batches` global batches of the held-out data."""
        means = self._evaluated(self.valid_data, self.config.training.eval_batches)
        means.pop("valid_tokens")
        return {"step": self.state["step"], **means, "tokens": self.state["tokens"]}

    def _evaluated(self, dataset: Any, num_batches: int, step: StepFunc | None = None) -> dict[str, float]:
        """Return token means over the first global batches of `dataset`."""
        return evaluate(
            self.train_state.chunks,
            self.batches(dataset, 0),
            num_microbatches=self.num_microbatches * num_batches,
            sequence_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            step=step,
        )

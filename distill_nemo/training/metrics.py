"""Outputs for metrics: `metrics.jsonl`, TensorBoard, W&B, MLflow, and one line on the screen."""

import hashlib
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from distill_nemo.config import LoggingConfig
from distill_nemo.runtime import metrics_file
from distill_nemo.training.mlflow_run import MlflowRun
from distill_nemo.training.wandb_run import start_wandb

if TYPE_CHECKING:
    import wandb


class MetricsLog:
    """Writer of metrics, on rank 0 only. A resumed run first drops the lines beyond its step, so none comes twice."""

    def __init__(
        self,
        output_dir: Path,
        config: LoggingConfig,
        steps: int,
        resumed_step: int,
        enabled: bool,
        parameters: Mapping[str, Any] = MappingProxyType({}),  # of the run, for W&B and MLflow
    ) -> None:
        self.path, self.steps, self.enabled = output_dir / "metrics.jsonl", steps, enabled
        self.writers: list[Any] = []
        self._first_step, self._start = resumed_step, time.monotonic()
        self._progress: Any = None
        self._begun: dict[str, Any] = {}
        self._wandb: wandb.Run | None = None
        self._mlflow: MlflowRun | None = None
        if not enabled:
            return
        metrics_file.truncate_after(self.path, resumed_step)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writers.append(SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1))
        if config.wandb_project:
            self._wandb = start_wandb(config.wandb_project, output_dir, _identifier(output_dir), parameters)
        if config.mlflow_experiment:
            names = config.mlflow_experiment, output_dir.resolve().name, _identifier(output_dir)
            self._mlflow = MlflowRun(*names, parameters)
        self._progress = _progress_bar(steps, resumed_step) if sys.stdout.isatty() else None

    def start(self, values: dict[str, Any]) -> None:
        """Record what this process of the run starts with, before its first other line."""
        self._begun = {"kind": "start", **values}

    def train(self, values: dict[str, Any], show: bool) -> None:
        """Record a training step; `show` also prints it if there is no terminal for a progress bar."""
        self._write({"kind": "train", **values}, show)

    def evaluation(self, values: dict[str, Any]) -> None:
        """Record an evaluation."""
        self._write({"kind": "eval", **values}, show=True)

    def end(self, values: dict[str, Any]) -> None:
        """Record values that are known only when this process of the run ends."""
        self._write({"kind": "end", **values}, show=False)

    def _write(self, line: dict[str, Any], show: bool) -> None:
        if not self.enabled:
            return
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }  # as JSON has it
        if self._begun:
            metrics_file.append(self.path, self._begun)
            self._begun = {}
        metrics_file.append(self.path, line)
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for writer in self.writers:
            for name, value in numbers.items():
                writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        if self._wandb:
            self._wandb.log({f"{line['kind']}/{k}": v for k, v in numbers.items()}, step=line["step"])
        if self._mlflow:
            self._mlflow.log(line["kind"], numbers, line["step"])
        self._show(line, show)

    def _show(self, line: dict[str, Any], show: bool) -> None:
        text = "  ".join(
            f"{name.replace('_', ' ')} {line[name]:.4f}"
            for name in ("lm_loss", "kd_loss", "logit_loss", "hidden_loss", "forward_kl", "top1_agreement")
            if line.get(name) is not None
        )
        if line["kind"] == "train":
            text += f"  {line['tokens_per_second']:,.0f} tokens/s"
        if self._progress and line["kind"] == "train":
            self._progress.update(self._progress.task_ids[0], completed=line["step"], text=text)
        elif show:
            label = "held out  " if line["kind"] == "eval" else ""
            message = f"step {line['step']}/{self.steps}  {label}{text}{self._eta(line)}"
            (self._progress.console.print if self._progress else _print)(message)

    def _eta(self, line: dict[str, Any]) -> str:
        done = line["step"] - self._first_step
        if line["kind"] != "train" or done <= 0:
            return ""
        left = (time.monotonic() - self._start) / done * (self.steps - line["step"])
        return f"  ETA {int(left // 60)}:{int(left % 60):02d}"

    def flush(self) -> None:
        """Flush TensorBoard's files, so that a crash loses nothing recorded so far."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Flush and close all outputs."""
        if self._progress:
            self._progress.stop()
        for writer in self.writers:
            writer.close()
        if self._wandb:
            self._wandb.finish()
        if self._mlflow:
            self._mlflow.close()


def _print(text: str) -> None:
    print(text, flush=True)


def _progress_bar(steps: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
    progress = Progress(*columns, TimeRemainingColumn())
    progress.add_task("", total=steps, completed=done, text="")
    progress.start()
    return progress


def _identifier(output_dir: Path) -> str:
    """Return an id that every attempt at a run shares, and that changes if `output_dir` is deleted or copied."""
    kept = output_dir / "tracker_id"
    if not kept.is_file():
        kept.write_text(uuid.uuid4().hex)
    return hashlib.sha256(kept.read_bytes() + b" " + os.fsencode(output_dir.resolve())).hexdigest()[:16]

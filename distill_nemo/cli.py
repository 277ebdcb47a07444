"""The commands of `nemo distill`. Light at import: torch's and Megatron's work happens in the worker.

A recipe is a `run.Partial(distill, ...)`. `train` launches one through NeMo-Run and, unlike NeMo-Run's own task
commands, exits non-zero when a rank fails.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fiddle as fdl
import nemo_run as run
import psutil
from nemo_run.cli.api import list_factories

from distill_nemo.config import near
from distill_nemo.executors import local
from distill_nemo.training.entry import distill

NAMESPACE = "distill"


@contextlib.contextmanager
def passing_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the ranks, which write a checkpoint and end.

    NeMo-Run starts local jobs in sessions of their own, where a terminal's Ctrl-C does not come, and when it is itself
    terminated it leaves them running.
    """

    def stop(signum: int, frame: Any) -> None:
        print("stopping: waiting for the checkpoint; the same command resumes", file=sys.stderr)
        for child in psutil.Process().children():
            child.terminate()
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stages(run.Experiment):
    """An experiment whose stages need each other: after one that failed, none is started (NeMo-Run would go on)."""

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        super()._wait_for_jobs(jobs)
        for job in jobs:
            if str(job.state) != "SUCCEEDED":
                print(f"{job.id}: {job.state}; logs: {job.executor.job_dir}", file=sys.stderr)
                sys.exit(1)


class TrainContext(run.cli.RunContext):
    """NeMo-Run's task command, with a true exit code and our errors for unknown recipes and fields."""

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        task = parse_recipe(self, fn, task_args)
        if self.to_yaml or self.to_json or self.to_toml:
            raise ValueError("every run writes its complete config to <output_dir>/config.yaml; use that")
        executor = fdl.build(self.executor) if isinstance(self.executor, fdl.Buildable) else self.executor or local()
        if self.dryrun:
            run.dryrun_fn(task, executor=executor)
            return
        with run.Experiment(self.name) as experiment:
            experiment.add(task, executor=executor, name=self.name, tail_logs=True)
            self.launch_and_exit(experiment)

    def launch_and_exit(self, experiment: run.Experiment, sequential: bool = False) -> None:
        """Run the experiment; exit 1, naming the tasks, unless every one of them succeeded."""
        self.executor = self.executor or run.LocalExecutor()
        with passing_on_signals():
            self.launch(experiment, sequential=sequential)
        if self.detach:
            return
        states = experiment.status(return_dict=True) or {}
        failed = {name: str(s["status"]) for name, s in states.items() if str(s["status"]) != "SUCCEEDED"}
        for name, state in failed.items():
            print(f"{name}: {state}; logs: {states[name]['local_dir']}", file=sys.stderr)
        if failed or not states:
            sys.exit(1)


def registered_recipes() -> list[Callable[..., Any]]:
    """Every function registered as a recipe, by name."""
    of_distill: Any = distill  # NeMo-Run keys them by the function; its annotation says type
    return sorted(list_factories(of_distill), key=lambda factory: factory.__name__)


def parse_recipe(ctx: run.cli.RunContext, fn: Callable[..., Any], arguments: list[str]) -> Any:
    """The recipe that `--factory` names, with the overrides applied."""
    if isinstance(ctx.factory, str):
        name = ctx.factory.split("(")[0]
        known = [factory.__name__ for factory in registered_recipes()]
        if name not in known and "." not in name:
            raise ValueError(f'unknown recipe "{name}".{near(name, known)}')
    try:
        return ctx.parse_fn(fn, arguments)
    except Exception as error:  # NeMo-Run wraps many kinds; all of them are the user's words on the command line
        raise ValueError(_explain(str(error), fn)) from None


def _explain(message: str, fn: Callable[..., Any]) -> str:
    return f"{message}\nSee `nemo distill train --help` for the fields, `nemo distill recipes` for the recipes."


run.cli.entrypoint(
    distill,
    name="train",
    namespace=NAMESPACE,
    run_ctx_cls=TrainContext,
    skip_confirmation=True,
    help="Train a student against a teacher. nemo distill train --factory llama32_3b_to_1b training.steps=100 --yes",
)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False)
def prepare(
    inputs: str, output: str, tokenizer: str, text_key: str = "text", num_workers: int = 0, max_bad_records: int = 0
) -> None:
    """Tokenise text into the .bin/.idx files that training reads.

    Args:
        inputs: files, directories or globs of text, JSONL or parquet, separated by commas.
        output: prefix of the files written.
        tokenizer: a Hugging Face tokenizer directory.
        text_key: field of JSONL and parquet records that holds the text.
        num_workers: processes; 0 takes one per core.
        max_bad_records: how many unreadable records to skip before giving up.
    """
    from distill_nemo.data.prepare import prepare as prepare_files

    prepare_files(
        inputs.split(","),
        output,
        tokenizer,
        text_key=text_key,
        num_workers=num_workers or None,
        max_bad_records=max_bad_records,
    )


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False)
def export(checkpoint: str, output: str, tokenizer: str = "") -> None:
    """Write a saved step as a Hugging Face directory, and check that it gives the same logits.

    Args:
        checkpoint: a run's output directory, its checkpoints directory, or one step_* directory.
        output: the Hugging Face directory to write.
        tokenizer: tokenizer directory to copy beside the weights.
    """
    from distill_nemo.checkpoint.export import export as export_checkpoint

    export_checkpoint(checkpoint, output, tokenizer or None)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False)
def evaluate(student: str, data: str, teacher: str = "", sequence_length: int = 1024, batches: int = 64) -> None:
    """Held-out LM loss of a checkpoint and, with a teacher, forward KL, top-1 agreement and teacher entropy.

    Args:
        student: checkpoint directory, ours or Hugging Face.
        data: prefix of the held-out .bin/.idx files.
        teacher: checkpoint directory; empty for none.
        sequence_length: tokens per sample.
        batches: how many samples.
    """
    from distill_nemo.config import StudentConfig, TeacherConfig
    from distill_nemo.runtime.device import setup_device

    setup_device()  # before Megatron is imported
    from distill_nemo.training.evaluate import evaluate_student

    reference = TeacherConfig(checkpoint=teacher) if teacher else None
    means = evaluate_student(StudentConfig(checkpoint=student), data, reference, sequence_length, batches)
    for name, value in means.items():
        print(f"{name:18} {value:.4f}")


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False)
def recipes() -> None:
    """List the recipes, a line each."""
    for factory in registered_recipes():
        print(f"{factory.__name__:22} {(factory.__doc__ or '').strip().splitlines()[0]}")

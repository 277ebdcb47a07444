"""Benchmarks of a run's saved steps, in a job beside it, for which training never waits. Run by every rank."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from distill_nemo.benchmarks.evaluate import (
    Model,
    as_huggingface,
    benchmark,
    earlier_result,
    locked,
    ready_models,
    result_file,
)
from distill_nemo.benchmarks.tasks import check_tasks
from distill_nemo.checkpoint.directory import BENCHMARKS, benchmarks_of, linked, measured_identity, step_directory
from distill_nemo.checkpoint.hub_models import named
from distill_nemo.config import TrainingConfig
from distill_nemo.config_files import load_yaml
from distill_nemo.fields import first_few, require
from distill_nemo.job_config import EvaluateConfig, words_of
from distill_nemo.models.sources import saved_steps
from distill_nemo.reports.runs import is_going_on
from distill_nemo.reports.scores import SCORES, Score, Scores, read_scores, scores_table, write_scores
from distill_nemo.runtime.checksums import identity_of
from distill_nemo.runtime.files import write_atomically
from distill_nemo.runtime.process_groups import of_all_ranks, rank

LINES = "benchmarks.jsonl"  # beside the run's metrics.jsonl
HELD = "held"  # checkpoints that are being exported, below the run's benchmarks
EXPORTED = "exported"  # their exports
POLL_SECONDS = 2.0
QUIET_SECONDS = 30.0  # without a sign of the run, before it is said that it is waited for


def follow(config: EvaluateConfig, run: Path) -> None:
    """Measure the steps of a run as they are saved, until it ends. What was measured before is not measured again.

    Waits for the end of another process that measures them: a job that an earlier command has left behind.

    Args:
        config: names the tasks, and further models to measure once.
        run: output_dir of the run, which need not have begun.

    Raises:
        ValueError: as `check_tasks` and `benchmark`; once all that is saved is measured, for a run that does not go on
            to its last step within `wait_minutes`.
    """
    tasks, output = words_of(config.tasks), run / BENCHMARKS
    check_tasks(config)
    with locked(output, patient=config.wait_minutes > 0):
        if rank() == 0:
            shutil.rmtree(output / HELD, ignore_errors=True)  # of a job that was killed
            _tell_of_gone(run, tasks, config)
        scores = Scores(named(config).models)
        if config.models:
            scores.scores = benchmark(ready_models(config.models, config, output), tasks, config, output)
        while (step := _next(run, tasks, config)) is not None:
            model = _model(run, step, config)
            if model is None:
                continue
            found = benchmark([model], tasks, config, output)
            if rank() == 0:
                shutil.rmtree(model.directory, ignore_errors=True)
                _write(run, step, model, found)
                _write_all(run, scores)
        if rank() == 0 and (output / SCORES).is_file():
            Console().print(scores_table(read_scores(output / SCORES)))
            print(f"scores: {output / SCORES}", flush=True)
        missing = of_all_ranks(_missing(run, config) if rank() == 0 else "")[0]
        require(not missing, missing)


def _model(run: Path, step: int, config: EvaluateConfig) -> Model | None:
    """Export a step below the run's benchmarks. Return None, on all ranks, if the run has deleted it. Collective."""
    saved = step_directory(run / "checkpoints", step)
    held = run / BENCHMARKS / HELD / saved.name
    identity = of_all_ranks(identity_of(held) if rank() == 0 and linked(saved, held) else None)[0]
    if identity is None:
        if rank() == 0:
            print(
                f"step {step}: the run has deleted its checkpoint (checkpoint.keep_last), so it is not measured; "
                "training.benchmark_interval keeps steps until they are",
                flush=True,
            )
        return None
    if rank() == 0:
        _leave_earlier(run, step, identity)
    target = run / BENCHMARKS / EXPORTED / _name(step, identity)
    model = Model(f"step {step}", as_huggingface(str(held), target, config), identity)
    if rank() == 0:
        shutil.rmtree(held, ignore_errors=True)
    return model


def _name(step: int, identity: str) -> str:
    return f"step_{step:08d}-{identity[:16]}"


def _leave_earlier(run: Path, step: int, identity: str) -> None:
    """Say that a step has scores of a checkpoint that was replaced, and remove what a killed job exported of it."""
    if benchmarks_of(run, step).is_file() and measured_identity(run, step) != identity:
        print(
            f"step {step}: its scores are of another checkpoint than the one that is saved now, so they are measured "
            "again",
            flush=True,
        )
    for path in (run / BENCHMARKS / EXPORTED).glob(f"*step_{step:08d}*"):  # whole, or as it was being written
        if _name(step, identity) not in path.name:
            shutil.rmtree(path, ignore_errors=True)


def _next(run: Path, tasks: list[str], config: EvaluateConfig) -> int | None:
    """Return a step that is saved and not measured, once there is one; None when the run has ended. Collective."""
    return of_all_ranks(_wait(run, tasks, config) if rank() == 0 else None)[0]


def _wait(run: Path, tasks: list[str], config: EvaluateConfig) -> int | None:
    began, is_told, written = time.monotonic(), False, _last_write(run)
    while True:
        before, written = written, _last_write(run)
        goes_on = is_going_on(run) or written != before  # asked before looking for its last step
        saved, training = _saved(run)
        last = config.until_step or training.steps
        for step in saved:
            is_due = step == last or step % (training.benchmark_interval or 1) == 0
            if is_due and not _is_measured(run, step, tasks, config):
                return step
        quiet = time.monotonic() - began
        if goes_on and not (config.until_step and last in saved):
            began, is_told = time.monotonic(), False
        elif last in saved or quiet >= config.wait_minutes * 60:
            return None
        elif quiet > QUIET_SECONDS and not is_told:
            print(f"waiting for the run in {run}, for {config.wait_minutes:g} minutes (wait_minutes=)", flush=True)
            is_told = True
        time.sleep(POLL_SECONDS)


def _saved(run: Path) -> tuple[list[int], TrainingConfig]:
    """Return the saved steps of a run, the oldest first, and the settings that it was last started with."""
    saved = [int(path.name[5:]) for path in reversed(saved_steps(run / "checkpoints"))]
    return saved, load_yaml(run / "config.yaml").training if saved else TrainingConfig()


def _last_write(run: Path) -> int | None:
    """Return the time of the last line of metrics, a sign of life on file systems that have no locks."""
    path = run / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.is_file() else None


def _missing(run: Path, config: EvaluateConfig) -> str:
    """Return what to say of a run that has not come to its last step; empty if it has, or was not to be waited for."""
    saved, training = _saved(run)
    last = config.until_step or training.steps
    if last in saved or config.wait_minutes == 0:
        return ""
    waited = f"within wait_minutes = {config.wait_minutes:g}"
    if not saved:
        return f"steps_of = {run}: no run has saved a step there {waited}; start the run, and repeat this command"
    return (
        f"steps_of = {run}: the run did not go on from step {saved[-1]} of {last} {waited}; what it saved is measured. "
        "Resume it, and repeat this command"
    )


def _tell_of_gone(run: Path, tasks: list[str], config: EvaluateConfig) -> None:
    """Print the steps that were measured by other tasks, and whose checkpoints the run has deleted since."""
    measured = [int(path.stem[5:]) for path in sorted((run / BENCHMARKS).glob("step_*.json"))]
    there = {int(path.name[5:]) for path in saved_steps(run / "checkpoints")}
    gone = [str(step) for step in measured if step not in there and not _is_measured(run, step, tasks, config)]
    if gone:
        print(
            f"step {', '.join(first_few(gone))}: the checkpoint is gone (checkpoint.keep_last), so it is not measured "
            f"by {', '.join(tasks)}; scores by other tasks stay",
            flush=True,
        )


def _is_measured(run: Path, step: int, tasks: list[str], config: EvaluateConfig) -> bool:
    """Return True if all tasks are measured of a step's checkpoint; of one that is gone, of the last that was."""
    identity, saved = measured_identity(run, step), step_directory(run / "checkpoints", step)
    if not identity or (saved.is_dir() and identity_of(saved) != identity):
        return False
    results = (earlier_result(result_file(identity, task, config, run / BENCHMARKS)) for task in tasks)
    return all(result is not None for result in results)


def _write(run: Path, step: int, model: Model, found: list[Score]) -> None:
    """Write a step's scores, and with them those of the same checkpoint that an earlier command measured."""
    path, measured, known = benchmarks_of(run, step), {each.task for each in found}, []
    if measured_identity(run, step) == model.identity:
        known = [each for each in read_scores(path).scores if each.task not in measured]
    saved = str(step_directory(run / "checkpoints", step))
    scores = Scores({model.name: saved}, [*known, *found], identities={model.name: model.identity})
    write_scores(path, scores)


def _write_all(run: Path, scores: Scores) -> None:
    """Write the scores of all steps beside the others, and as lines beside the run's metrics."""
    steps = [read_scores(path) for path in sorted((run / BENCHMARKS).glob("step_*.json"))]
    joined: dict[tuple[str, str], Score] = {(each.task, each.metric): replace(each) for each in scores.scores}
    models, identities = dict(scores.models), dict(scores.identities)
    for step in steps:
        models |= step.models
        identities |= step.identities
        for each in step.scores:
            known = joined.setdefault((each.task, each.metric), replace(each, values={}, errors={}))
            joined[each.task, each.metric] = replace(
                known, values=known.values | each.values, errors=known.errors | each.errors
            )
    write_scores(run / BENCHMARKS / SCORES, Scores(models, list(joined.values()), identities=identities))
    write_atomically(run / LINES, "".join(f"{json.dumps(line)}\n" for step in steps for line in _lines(step)))


def _lines(scores: Scores) -> Iterator[dict[str, object]]:
    """Yield a line for each metric of a step."""
    for each in scores.scores:
        for name, value in each.values.items():
            about = {"kind": "benchmark", "step": int(name.removeprefix("step ")), "task": each.task}
            yield {**about, "metric": each.metric, "value": value, "standard_error": each.errors.get(name)}

"""Rounds of a compression before the first one has begun: the models that each is about to cut and distil."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_nemo.checkpoint.directory import check_output_dir, checkpoint_root
from distill_nemo.checkpoint.export import prepare_export
from distill_nemo.checkpoint.hub_models import described
from distill_nemo.config import ParallelismConfig, PruneConfig, RunConfig, StudentConfig
from distill_nemo.data.datasets import check_held_out
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.huggingface import check_target
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.resolve import resolve
from distill_nemo.models.sources import saved_steps
from distill_nemo.pruning.calibration import with_sample_length
from distill_nemo.pruning.possible import files_of, possible_sizes
from distill_nemo.pruning.prune import check_data
from distill_nemo.pruning.record import RECORD
from distill_nemo.pruning.search import LEAST_SHARE, candidates, target_parameters
from distill_nemo.pruning.sizes import Sizes, check_prunable, evenly_spaced, given_sizes, predicted
from distill_nemo.pruning.stages import CompressConfig
from distill_nemo.reports.page import check_directory
from distill_nemo.runtime.files import read_object_if_any
from distill_nemo.training.data import check_run_data
from distill_nemo.training.entry import check_length, resolve_models

SCORED_BY = ("samples", "held_out_samples", "sequence_length", "layer_importance")


@dataclass(frozen=True)
class Round:
    """A cut and a distillation.

    Args:
        cut: the pruning.
        model: that is cut.
        possible: sizes among which the held-out loss decides.
        run: the distillation of a student of the first of these sizes, without its checkpoint.
    """

    cut: PruneConfig
    model: Architecture
    possible: list[Sizes]
    run: RunConfig


def foresee(config: CompressConfig, has_data: bool = True) -> list[Round]:
    """Return all rounds. Reads the teacher's config.json and tokenizer, and earlier results in the output.

    Args:
        config: the compression.
        has_data: False leaves its token files and its output unread.

    Raises:
        ValueError: for sizes, targets, data, a tokenizer or a layout that a stage would refuse, and an output that
            holds anything else.
    """
    local = described(config)
    model = resolve(StudentConfig(checkpoint=local.teacher))
    check_prunable(model)
    check_length(config.data.sequence_length, "teacher", model, "data.sequence_length")
    if has_data:
        check_run_data(replace(local.run(1), student=StudentConfig(checkpoint=local.teacher)), model)
        check_held_out(local.data)
        check_data(with_sample_length(local.cut(1)), model)
        check_directory(Path(config.output, "report"))
        files_of(model, torch.float32).check()
    teacher, total, most = model, num_parameters(model), target_parameters(config.cut(1))
    rounds: list[Round] = []
    students = [model]
    for number in range(1, config.rounds + 1):
        target = None if most is None else most ** (number / config.rounds) * total ** (1 - number / config.rounds)
        cut = with_sample_length(config.cut(number, target if config.rounds > 1 else None))
        parallelism = cut.parallelism or ParallelismConfig()
        possible = possible_sizes(model, cut, parallelism, partial(evenly_spaced, model))
        for other in students[1:]:  # any of which the round before may cut
            candidates(other, cut, parallelism, partial(evenly_spaced, other))
        if has_data:
            known = number == 1 and (most is None or len(set(model.layers)) == 1)
            _check_earlier(cut, config.directory(number), possible if known else None)
            _check_outputs(cut, local.run(number), teacher)
        students = [predicted(model, sizes) for sizes in possible]
        runs = [_run(config, number, student) for student in students]
        for each in runs:
            resolve_models(described(each))
        rounds.append(Round(cut, model, possible, runs[0]))
        model = students[0]
    return rounds


def _run(config: CompressConfig, number: int, student: Architecture) -> RunConfig:
    run = config.run(number)
    run.student = student.filled(StudentConfig())
    return run


def _check_earlier(cut: PruneConfig, directory: str, possible: list[Sizes] | None) -> None:
    """Refuse a directory with the run of another student. `possible` are all that the cut may have, if they are known.

    Raises:
        ValueError: with the way out.
    """
    if not saved_steps(checkpoint_root(directory)):
        return
    record = read_object_if_any(Path(cut.output) / RECORD)
    result, calibration = record.get("result"), record.get("calibration")
    scored_by = [vars(cut)[name] for name in SCORED_BY]
    require(
        isinstance(result, dict)
        and _is_possible(result, cut, possible)
        and isinstance(calibration, dict)
        and [calibration.get(name) for name in SCORED_BY] == scored_by,
        f"output: {directory} holds the run of another student{f' (see {cut.output})' if record else ''}; restore the "
        "fields of its cut to go on with it, or choose another output",
    )


def _check_outputs(cut: PruneConfig, run: RunConfig, teacher: Architecture) -> None:
    """Refuse directories that a round may not write, and a student that could not be exported, by its teacher's files.

    Raises:
        ValueError: naming the directory or the file.
    """
    check_output_dir(run.output_dir)
    check_target(Path(cut.output), cut.model, cut.data, teacher.name)
    prepare_export(replace(run, student=StudentConfig(checkpoint=teacher.name)), teacher, torch.float32)


def _is_possible(result: dict[str, Any], cut: PruneConfig, possible: list[Sizes] | None) -> bool:
    """Return True if a cut may have had a result."""
    sizes, count, most = result.get("sizes"), result.get("num_parameters"), target_parameters(cut)
    if possible is not None:
        return sizes in possible
    assert most is not None, "sizes that are stated are known"
    given = isinstance(sizes, dict) and given_sizes(cut).items() <= sizes.items()
    return given and isinstance(count, int) and LEAST_SHARE * most <= count <= most

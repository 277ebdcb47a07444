"""Evaluation of models: held-out metrics, and benchmarks, whose results are files. Run by every rank."""

import gc
import hashlib
import json
import re
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from distill_nemo.benchmarks.task_files import digest
from distill_nemo.benchmarks.tasks import check_tasks
from distill_nemo.checkpoint.export import export
from distill_nemo.checkpoint.hub_models import named
from distill_nemo.checkpoint.identity import NamedFiles, content_hashes, remember_hashes, weight_files
from distill_nemo.config import DataConfig, ExportConfig, ParallelismConfig, StudentConfig, TeacherConfig
from distill_nemo.fields import fields_named, require
from distill_nemo.job_config import EvaluateConfig, words_of
from distill_nemo.models.checkpoints.export_files import CHAT_TEMPLATES, TOKENIZER_FILES
from distill_nemo.models.sources import CheckpointKind, find_checkpoint, has_tokenizer
from distill_nemo.models.stored_quantization import MODELOPT_FILE, needs_package
from distill_nemo.reports.comparison import Row, render_table
from distill_nemo.reports.compressed import row
from distill_nemo.reports.scores import SCORES, Score, Scores, add_results, scores_table, write_scores
from distill_nemo.runtime.files import read_object, write_atomically
from distill_nemo.runtime.output_lock import OutputLock
from distill_nemo.runtime.process_groups import of_all_ranks, rank
from distill_nemo.training.evaluate import check_evaluation, evaluate_on

A_DAY = 24 * 60.0  # minutes: ranks may take long over their share of a task
ARGUMENTS = ("limit", "num_fewshot", "apply_chat_template", "batch_size", "dtype")
BESIDE_WEIGHTS = ("generation_config.json", MODELOPT_FILE, *TOKENIZER_FILES, *CHAT_TEMPLATES)  # and the description


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Args:
        name: in tables.
        directory: in Hugging Face format.
        identity: hash of weights, config and tokenizer; of a run's step, `identity_of`.
    """

    name: str
    directory: Path
    identity: str


def evaluate_models(config: EvaluateConfig) -> None:
    """Measure all that a config names, print tables, and write `scores.json`. Every rank calls it, in one world.

    Raises:
        ValueError: for data or tasks that cannot be measured.
    """
    tasks, output = words_of(config.tasks), Path(config.output) if config.output else None
    if tasks:
        check_tasks(config)
    with locked(output):
        scores = Scores(named(config).models, held_out=held_out(config))
        if tasks:
            assert output is not None, "of a config that was checked"
            scores.scores = benchmark(ready_models(config.models, config, output), tasks, config, output)
        if rank() == 0:
            _show(scores, config)
            if output:
                write_scores(output / SCORES, scores)
                print(f"scores: {output / SCORES}", flush=True)


def check_models(config: EvaluateConfig) -> None:
    """Refuse models that are missing, and results among the files of one. A rank needs no other rank for it.

    Raises:
        ValueError: naming the directory.
    """
    output = Path(config.output) if config.output else None
    for path in config.models.values():
        weights = find_checkpoint(Path(path)).weights
        require(
            output is None or not output.resolve().is_relative_to(weights.resolve()),
            f"output = {output} is in the model {weights}, whose next export would replace it; name another directory",
        )


def locked(output: Path | None, patient: bool = False) -> AbstractContextManager[object]:
    """Return a lock of the results, held by rank 0, which waits for another holder if it is `patient`."""
    if output is None or rank() > 0:
        return nullcontext()
    return OutputLock(output / "evaluate.lock", f"output = {output}", patient)


def _show(scores: Scores, config: EvaluateConfig) -> None:
    console = Console()
    if scores.held_out and len(config.domains) == 1 and config.baseline is None:
        for name, value in scores.held_out[0]["means"].items():
            print(f"{name:18} {value:,.0f}" if name == "tokens" else f"{name:18} {value:.4f}")
    elif scores.held_out:
        console.print(render_table(scores.held_out))
    if scores.scores:
        console.print(scores_table(scores))


def held_out(config: EvaluateConfig) -> list[Row]:
    """Return a row for each model and domain, and for the teacher; empty without data. Collective.

    Raises:
        ValueError: as `evaluate_on`.
    """
    layout = config.parallelism or ParallelismConfig()
    cache = f"{config.output}/index_cache" if config.output else None
    teacher = TeacherConfig(checkpoint=config.teacher, vocab_size=config.vocab_size) if config.teacher else None
    texts = {
        domain: DataConfig(train=[prefix], valid=[prefix], sequence_length=config.sequence_length)
        for domain, prefix in config.domains.items()
    }
    students = {
        name: StudentConfig(checkpoint=path, vocab_size=config.vocab_size)
        for name, path in config.models.items()
        if name != "teacher"
    }
    for name, student in students.items():  # all, before any is measured
        for data in texts.values():
            with fields_named(_as_typed(name)):
                check_evaluation(data, student, teacher, layout)
    rows: list[Row] = []
    for domain, data in texts.items():
        ending = f", {domain}" if len(texts) > 1 else ""
        for name, student in students.items():
            means = evaluate_on(data, student, teacher, config.samples, layout, cache=cache)
            gc.collect()  # a distillation model refers to itself, and would stay in memory beside the next one
            rows.append(row(f"{name}{ending}", means) | {"means": means})
        if teacher is not None:
            rows.append(row(f"teacher{ending}", {"lm_loss": rows[-1]["means"]["teacher_lm_loss"]}))
    return rows


def _as_typed(name: str) -> dict[str, str]:
    """Return the names of fields by those of a run whose student is the model `name`."""
    return {
        "data.train": "data",
        "data.valid": "data",
        "data.sequence_length": "sequence_length",
        "student.checkpoint": name,
        "teacher.checkpoint": "teacher",
        "student.vocab_size": f"vocab_size of the {name}",
        "teacher.vocab_size": "vocab_size of the teacher",
        "the student's": f"the {name}'s",
        "student and teacher": f"{name} and teacher",
        "set both to": "set vocab_size to",
    }


def ready_models(paths: dict[str, str], config: EvaluateConfig, output: Path) -> list[Model]:
    """Return models by name as Hugging Face directories; others are exported below `output`. Collective.

    Raises:
        ValueError: as `export`.
    """
    files = {name: _files(path, config.tokenizer) for name, path in paths.items()}
    hashes = content_hashes(files, output, {})
    if rank() == 0:
        remember_hashes(files, output, {})
    identities = {name: str(hashes[name]) for name in paths}
    targets = {name: output / "exported" / identities[name][:16] for name in paths}
    return [Model(name, as_huggingface(paths[name], targets[name], config), identities[name]) for name in paths]


def _files(checkpoint: str, tokenizer: str | None) -> NamedFiles:
    found = find_checkpoint(Path(checkpoint))
    directories = [found.weights]
    if tokenizer is not None and not has_tokenizer(found.weights):
        directories.append(Path(tokenizer))
    described = [found.description] if found.description else []
    described += [file for each in directories for pattern in BESIDE_WEIGHTS for file in sorted(each.glob(pattern))]
    return [*weight_files(checkpoint), *((file.name, file.resolve()) for file in described if file.is_file())]


def as_huggingface(checkpoint: str, target: Path, config: EvaluateConfig) -> Path:
    """Return a checkpoint that transformers opens; of another, its export, unless that exists. Collective.

    Quantised students and directories are exported with their rounded weights; inputs of layers are not rounded.

    Raises:
        ValueError: as `export`.
    """
    found = find_checkpoint(Path(checkpoint))
    if found.kind is CheckpointKind.HUGGING_FACE and not needs_package(found.weights):
        return found.weights
    if not target.is_dir():
        source = str(found.weights) if found.kind is CheckpointKind.OURS else checkpoint
        export(ExportConfig(source, str(target), config.tokenizer, quantized="none", parallelism=config.parallelism))
    return target


def benchmark(models: list[Model], tasks: list[str], config: EvaluateConfig, output: Path) -> list[Score]:
    """Measure what is missing. Return all scores on rank 0. Collective.

    Raises:
        ValueError: as `_measure`.
    """
    files = {
        (model.name, task): result_file(model.identity, task, config, output) for model in models for task in tasks
    }
    for model in models:
        missing = of_all_ranks([task for task in tasks if earlier_result(files[model.name, task]) is None])[0]
        if missing:
            _measure(model, {task: files[model.name, task] for task in missing}, config)
            gc.collect()  # or two models would be in memory
    scores: list[Score] = []
    for (name, task), file in files.items() if rank() == 0 else ():
        add_results(scores, name, task, earlier_result(file) or {})
    return scores


def earlier_result(file: Path) -> dict[str, Any] | None:
    """Return the results of a task that a file holds; None if there is no file, or a damaged one."""
    with suppress(ValueError):
        found = read_object(file)
        return found if isinstance(found.get("results"), dict) else None
    return None


def _measure(model: Model, missing: dict[str, Path], config: EvaluateConfig) -> None:
    """Write the results of tasks. Those of earlier ones stay if a later one cannot be measured.

    Raises:
        ValueError: as `task_manager` and `results_of`.
    """
    from distill_nemo.benchmarks.harness import SharedModel, results_of, task_manager

    index = task_manager(list(missing), config, model.directory)
    opened = SharedModel(model.directory, config, None if has_tokenizer(model.directory) else config.tokenizer)
    for task, file in missing.items():
        began = time.monotonic()
        found = results_of(opened, task, index, config)
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(_identity(model.identity, task, config) | found, indent=2, default=float))
            print(f"{model.name}: {task} measured in {time.monotonic() - began:,.0f} s", flush=True)


def _identity(model: str, task: str, config: EvaluateConfig) -> dict[str, Any]:
    """Return all that decides the results; the number of ranks does not, but for rounding."""
    of_user = digest(Path(config.include_path), config.allow_code) if config.include_path else None
    arguments = {name: vars(config)[name] for name in ARGUMENTS}
    return {"model": model, "task": task, "include_path": of_user, "lm_eval": version("lm_eval"), **arguments}


def result_file(model: str, task: str, config: EvaluateConfig, output: Path) -> Path:
    """Return the file for the results of a task, whose name has a hash of all that decides them."""
    key = hashlib.sha256(json.dumps(_identity(model, task, config)).encode()).hexdigest()[:16]
    return output / "results" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', task)[:80]}-{key}.json"

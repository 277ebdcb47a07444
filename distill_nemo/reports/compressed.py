"""Last stages of `nemo distill compress`: evaluation of the students, and the page. Light at import."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig, StudentConfig
from distill_nemo.config_files import load_yaml
from distill_nemo.reports.comparison import perplexity
from distill_nemo.runtime.errors import errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports

EVALUATION = "evaluation.json"  # of a run: rows of its comparison
ROW = {"model", "parameters", "lm_loss", "forward_kl", "top1_agreement", "perplexity"}


def evaluate_run(output: str) -> None:
    """Evaluate a run's teacher, initial and exported student on its held-out text. Every rank calls it.

    As many samples as in one of the run's evaluations, at the run's layout without context parallelism.

    Args:
        output: directory of a run that distilled; the rows are written to its evaluation.json.

    Raises:
        ValueError: for a run that has not exported its student, or a layout that the ranks do not divide.
    """
    from distill_nemo.runtime.orphans import end_with_torchrun
    from distill_nemo.runtime.signals import end_at_sigurg

    end_at_sigurg()
    end_with_torchrun()
    with megatron_imports():
        from distill_nemo.checkpoint.hub_models import on_this_machine
        from distill_nemo.models.sources import find_checkpoint
        from distill_nemo.reports.runs import exported_parameters
        from distill_nemo.runtime.files import write_atomically
        from distill_nemo.runtime.process_groups import rank

    with errors_of_a_rank():
        config = on_this_machine(load_yaml(Path(output) / "config.yaml"))
        assert config.teacher is not None, "a compression distils"
        student = f"{output}/student"
        find_checkpoint(Path(student))
        models = {"pruned student": config.student.checkpoint, "distilled student": student}
        means = {name: _means(StudentConfig(checkpoint=path), config) for name, path in models.items()}
        if rank() != 0:
            return
        teacher = config.teacher.checkpoint
        of_teacher = {"lm_loss": means["distilled student"]["teacher_lm_loss"]}
        rows = [row("teacher", of_teacher), *map(row, means, means.values())]
        for each, path in zip(rows, (teacher, *models.values()), strict=True):
            each["parameters"] = exported_parameters(Path(str(path)))
        write_atomically(Path(output) / EVALUATION, json.dumps(rows, indent=2))
        print(f"evaluated {student}: {Path(output) / EVALUATION}", flush=True)


def _means(student: StudentConfig, config: RunConfig) -> dict[str, float]:
    from distill_nemo.training.evaluate import evaluate_on

    samples = config.training.eval_batches * config.training.global_batch_size
    cache = str(config.data.cache or Path(config.output_dir) / "index_cache")
    layout = config.parallelism.without_training()
    offload = config.distillation.offload_teacher
    means = evaluate_on(config.data, student, config.teacher, samples, layout, 0, cache, "data.cache", offload)
    gc.collect()  # a distillation model refers to itself, and would stay in memory beside the next one
    return means


def row(name: str, means: dict[str, float]) -> dict[str, Any]:
    """Return a row of a comparison."""
    named = {metric: means.get(metric) for metric in ("lm_loss", "forward_kl", "top1_agreement")}
    return {"model": name, **named, "perplexity": perplexity(means["lm_loss"])}


def read_rows(output: str | Path) -> list[dict[str, Any]] | None:
    """Return the rows of a run's evaluation.json; None if there is no such file, or a damaged one."""
    try:
        rows = json.loads((Path(output) / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(rows, list) and rows and all(isinstance(each, dict) and ROW <= each.keys() for each in rows)
    return rows if whole else None


def report_rounds(directories: list[str], prompts: list[str]) -> None:
    """Write the page of all rounds to `report` in the last one's directory, with the table of its evaluation.json.

    Args:
        directories: of the rounds' runs.
        prompts: beginnings of text that the students go on with.
    """
    from distill_nemo.reports.page import write_page
    from distill_nemo.reports.report import page_of
    from distill_nemo.reports.runs import read_runs

    with errors_of_a_rank():
        output = Path(directories[-1])
        table = read_rows(output)
        if table is None:
            raise ValueError(f"{output / EVALUATION} is missing or damaged; run the same command again to write it")
        page = replace(page_of(read_runs(directories), prompts), table=table, measured_on="On held-out text")
        print(f"report: {write_page(output / 'report', page)}", flush=True)

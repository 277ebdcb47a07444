"""The quickstart's last stage: compare teacher, initial student, student alone and distilled student."""

import json
import shutil
from pathlib import Path

from distill_nemo.config import StudentConfig
from distill_nemo.config_files import load_yaml
from distill_nemo.reports.compressed import row
from distill_nemo.runtime.files import writing_directory
from distill_nemo.runtime.imports import megatron_imports

PROMPT = "def __init__(self"


def compare_quickstart(root: str, samples: int = 128) -> None:
    """Evaluate the exported models on held-out text, write the report, and its table to `comparison.json`.

    Args:
        root: the quickstart's directory.
        samples: number of held-out sequences.
    """
    from distill_nemo.reports.page import lock_of

    with lock_of(Path(root) / "report"):
        _compare(Path(root), samples)


def _compare(directory: Path, samples: int) -> None:
    with megatron_imports():
        from distill_nemo.reports.page import Page, write_page
        from distill_nemo.reports.planned import plans_of
        from distill_nemo.reports.runs import exported_parameters, read_run
        from distill_nemo.training.evaluate import evaluate_student

    config = load_yaml(directory / "distilled" / "config.yaml")
    assert config.teacher is not None, "the quickstart distils"
    _publish(directory)
    teacher = config.teacher.checkpoint
    models = {
        "teacher": StudentConfig(checkpoint=teacher),
        "initial student": config.student,
        "student alone": StudentConfig(checkpoint=str(directory / "alone" / "student")),
        "distilled student": StudentConfig(checkpoint=str(directory / "student")),
    }
    seed, length = config.training.seed, config.data.sequence_length
    table = []
    for name, model in models.items():
        means = evaluate_student(model, config.data.valid[0], config.teacher, length, samples, seed)
        parameters = exported_parameters(Path(model.checkpoint or directory / "student"))
        table.append(row(name, means) | {"parameters": parameters})
    runs = [read_run(directory / name, name) for name in ("teacher", "alone", "distilled")]
    plans, notes = plans_of(runs)
    corpus = (
        f"On {samples} sequences of held-out text, every 20th module of Python's standard library (the curves below: "
        "another sample of it)"
    )
    page = write_page(directory / "report", Page(runs, table, corpus, plans, _samples(models), notes))
    (directory / "comparison.json").write_text(json.dumps(table, indent=2))
    print(f"report: {page}", flush=True)


def _publish(directory: Path) -> None:
    """Copy the distilled student's Hugging Face directory to the place that the README names."""
    from distill_nemo.models.checkpoints.huggingface import check_target

    check_target(directory / "student")
    with writing_directory(directory / "student") as partial:
        shutil.copytree(directory / "distilled" / "student", partial, dirs_exist_ok=True)


def _samples(models: dict[str, StudentConfig]) -> list[dict[str, str]]:
    """Return text of each exported model."""
    from distill_nemo.reports.samples import generate

    exported = {name: model.checkpoint for name, model in models.items() if model.checkpoint is not None}
    return [{"model": name, "prompt": PROMPT, "text": generate(path, [PROMPT])[0]} for name, path in exported.items()]

"""Scores of benchmarks: what `evaluate` writes to OUTPUT/scores.json, and its table. No torch."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from distill_nemo.config_files import from_dict
from distill_nemo.reports.comparison import MISSING, Row, four_digits
from distill_nemo.runtime.files import read_object, write_atomically
from distill_nemo.runtime.metrics_file import finite

SCORES = "scores.json"
ARROWS = {True: "↑", False: "↓", None: ""}


@dataclass
class Score:
    """A metric of a task.

    Args:
        task: its name.
        metric: its name, and the filter of the answers, if there is one.
        higher_is_better: None if unknown.
        values: by model.
        errors: standard errors by model; missing where the harness gives none.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name, and an arrow to the better values."""
        return f"{self.task} {self.metric} {ARROWS[self.higher_is_better]}".strip()

    def cell(self, model: str) -> str:
        """Return a model's value and standard error as text."""
        error = finite(self.errors.get(model))
        shown = four_digits(self.values[model]) if model in self.values else MISSING
        return shown if math.isnan(error) else f"{shown} ± {four_digits(error)}"


@dataclass
class Scores:
    """Content of `scores.json`.

    Args:
        models: checkpoint directories by name.
        scores: the metrics of all tasks.
        held_out: rows of `comparison`, by model and domain.
        identities: of checkpoints that a run saves again when it is set back, by model.
    """

    models: dict[str, str]
    scores: list[Score] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    identities: dict[str, str] = field(default_factory=dict)


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores, whole or not at all."""
    write_atomically(path, json.dumps(asdict(scores), indent=2))


def read_scores(path: Path) -> Scores:
    """Return the scores in a file.

    Raises:
        ValueError: if there are none, or the file holds something else.
    """
    found = read_object(path)
    scores = found.pop("scores", [])
    if not isinstance(scores, list):
        raise ValueError(f"{path}: scores must be a list")
    read = from_dict(found, Scores, f"{path}: ")
    read.scores = [from_dict(each, Score, f"{path}: scores.") for each in scores]
    return read


def add_results(scores: list[Score], model: str, task: str, found: dict[str, Any]) -> None:
    """Add a model's results on a task or group, as the harness returns them, to the scores.

    Of a group, its own metrics; of one that has none, and of a tag, those of its tasks.
    """
    results = found["results"]
    own = [task] if _metrics(results.get(task, {})) else [name for name in results if _metrics(results[name])]
    known = {(each.task, each.metric): each for each in scores}
    for name in own:
        for key in _metrics(results[name]):
            metric, _, kind = key.partition(",")
            title = metric if kind == "none" else f"{metric}, {kind}"
            score = known.get((name, title))
            if score is None:
                better = found.get("higher_is_better", {}).get(name, {}).get(metric)
                score = Score(name, title, better if isinstance(better, bool) else None)
                scores.append(score)
            score.values[model] = float(results[name][key])
            error = results[name].get(f"{metric}_stderr,{kind}")
            if not math.isnan(finite(error)):
                score.errors[model] = float(error)


def _metrics(results: dict[str, Any]) -> list[str]:
    named = [key for key in results if "," in key and not key.partition(",")[0].endswith("_stderr")]
    return [key for key in named if isinstance(results[key], int | float)]


def scores_table(scores: Scores) -> Table:
    """Return the table for a terminal: a row for each metric, a column for each model."""
    out = Table(box=box.SIMPLE_HEAD, caption="± standard error; an arrow points to the better values")
    out.add_column("benchmark", overflow="fold")
    for model in scores.models:
        out.add_column(Text(model), justify="right")
    for score in scores.scores:
        out.add_row(Text(score.title), *(Text(score.cell(model)) for model in scores.models))
    return out

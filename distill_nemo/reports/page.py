"""The page of several runs: self-contained HTML, and its plots beside it. No torch."""

import base64
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_nemo.planning.gpus import UTILISATION
from distill_nemo.reports import plots
from distill_nemo.reports.comparison import (
    COLUMNS,
    MISSING,
    Row,
    best,
    count,
    finding,
    finite,
    four_digits,
    render_table,
)
from distill_nemo.reports.data import data_of
from distill_nemo.reports.runs import RecordedRun, settings
from distill_nemo.reports.scores import Scores
from distill_nemo.runtime.files import writing_directory
from distill_nemo.runtime.output_lock import OutputLock

__all__ = ["Page", "render_table", "write_page"]

PAGE, PLOTS = "report.html", ("comparison", "lm_loss", "forward_kl")
FILES = {PAGE, *(f"{name}.png" for name in PLOTS), "loss_curves.png"}  # the last one of an earlier version


@dataclass(frozen=True)
class Page:
    """Contents of a page.

    Args:
        runs: the runs, in the order to show.
        table: the compared models, see `comparison`.
        measured_on: what the table's numbers were measured on.
        plans: by name of a run, cells of the table of plans by column.
        samples: `model`, `prompt` and generated `text` (which may begin with the prompt).
        notes: by name of a run, what else is to be known of it.
        scores: of benchmarks, by directory.
    """

    runs: list[RecordedRun]
    table: list[Row]
    measured_on: str = "On held-out text"
    plans: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)


def lock_of(directory: Path) -> OutputLock:
    """Return the lock of a report's directory, which only one process at a time may write."""
    target = directory.absolute()
    return OutputLock(target.with_name(f".{target.name}.lock"), f"output = {directory}")


def check_directory(directory: Path) -> None:
    """Refuse a directory that a report must not replace.

    Raises:
        ValueError: if it is no directory, is the current one, or holds anything but a report.
    """
    if (directory.exists() and not directory.is_dir()) or directory.absolute() == Path.cwd():
        raise ValueError(f"output = {directory} would be replaced by a directory: name a new one")
    strange = sorted(path.name for path in directory.iterdir() if path.name not in FILES) if directory.is_dir() else []
    if strange:
        raise ValueError(f"{directory} holds {strange[0]}, which is not part of a report: name an empty directory")


def write_page(directory: Path, page: Page) -> Path:
    """Write `report.html` and its plots into `directory`, replacing an earlier report. Return the path of the page.

    Raises:
        ValueError: from `check_directory`; nothing is changed then.
    """
    check_directory(directory)
    with writing_directory(directory) as partial:
        lines = {run.name: run.lines for run in page.runs}
        colour = plots.colours([row["model"] for row in page.table], lines)
        drawings = plots.loss_curves(lines, colour) if lines else {}
        if page.table:
            drawings["comparison"] = plots.comparison(page.table, colour)
        for name, drawing in drawings.items():
            plots.save(drawing, partial / f"{name}.png")
        images = {name: base64.b64encode((partial / f"{name}.png").read_bytes()).decode() for name in drawings}
        (partial / PAGE).write_text(_html(page, images), encoding="utf-8")
    return directory / PAGE


def _html(page: Page, images: dict[str, str]) -> str:
    """Return the page's HTML, with every value escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    winners = {column.key: best(page.table, column) for column in COLUMNS}
    rows = [
        {"model": r["model"], "cells": [(c.form(r.get(c.key)), r["model"] in winners[c.key]) for c in COLUMNS]}
        for r in page.table
    ]
    differ, same = settings(page.runs)
    return template.render(
        finding=finding(page.table),
        measured_on=page.measured_on,
        columns=COLUMNS,
        rows=rows,
        names=[run.name for run in page.runs],
        costs=[{"name": run.name, "cells": _cost(run)} for run in page.runs if run.lines],
        notes=[(run.name, [*run.notes, *page.notes.get(run.name, [])]) for run in page.runs],
        differ=differ,
        same=same,
        plan_columns=list(
            dict.fromkeys(name for cells in page.plans.values() for name, cell in cells.items() if cell != MISSING)
        ),
        plans=page.plans,
        utilisation=UTILISATION,
        data=data_of(page.runs),
        samples=[{**s, "text": s["text"].removeprefix(s["prompt"])} for s in page.samples],
        scores=[(name, _scores(each)) for name, each in page.scores.items()],
        images=images,
    )


def _scores(scores: Scores) -> dict[str, Any]:
    """Return the columns and rows of a table of benchmarks, and of one of the held-out data beside them."""
    held_out = [
        (each.get("model", ""), [column.form(each.get(column.key)) for column in COLUMNS]) for each in scores.held_out
    ]
    rows = [(each.title, [each.cell(model) for model in scores.models]) for each in scores.scores]
    return {"models": scores.models, "rows": rows, "held_out": held_out}


def _cost(run: RecordedRun) -> list[str]:
    """Return steps, tokens, time of the steps, median tokens/s, GPU-hours and last training loss of a run."""
    steps = run.of_kind("train")
    last: dict[str, Any] = steps[-1] if steps else {}
    rates = [rate for line in steps if (rate := finite(line.get("tokens_per_second"))) > 0]
    seconds = sum(s for line in steps if (s := finite(line.get("seconds"))) > 0)
    whole = round(seconds) if seconds < 1e9 else 0
    hours = run.gpu_hours
    device = str(next(reversed(run.of_kind("start")), {}).get("device", ""))[:40]
    return [
        str(run.lines[-1].get("step", 0))[:20],
        count(last.get("tokens", 0)),
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}",
        f"{statistics.median(rates):,.0f}" if rates else MISSING,
        MISSING if hours is None else f"{hours:.3g}{f' ({device})' if device else ''}",
        four_digits(last.get("lm_loss")),
    ]

"""The report of several runs: a self-contained HTML page, and its plots beside it. No torch."""

import base64
import statistics
from pathlib import Path
from typing import Any

from distill_nemo.reports import metrics_file, plots
from distill_nemo.reports.comparison import COLUMNS, Row, best, count, finding, finite, four_digits, render_table
from distill_nemo.runtime.files import writing_directory

__all__ = ["render_table", "write_report"]

PAGE, PLOTS = "report.html", ("comparison", "loss_curves")
FILES = {PAGE, *(f"{name}.png" for name in PLOTS)}


def write_report(
    directory: Path, runs: dict[str, Path], table: list[Row], facts: dict[str, str], samples: list[dict[str, str]]
) -> Path:
    """Write `report.html`, `comparison.png` and `loss_curves.png` into `directory`, replacing an earlier report.

    Args:
        directory: directory for the report and nothing else.
        runs: name of a run -> its `metrics.jsonl`; missing and empty files are listed as such.
        table: the compared models, see `comparison`.
        facts: settings of the runs, in the order to show.
        samples: `model`, `prompt` and generated `text` (which may begin with the prompt).

    Returns:
        Path of the page.

    Raises:
        ValueError: if `directory` holds anything but a report; nothing is changed then.
    """
    strange = sorted(path.name for path in directory.iterdir() if path.name not in FILES) if directory.is_dir() else []
    if strange:
        raise ValueError(f"{directory} holds {strange[0]}, which is not part of a report: name an empty directory")
    with writing_directory(directory) as partial:
        lines = {name: metrics_file.read(path) for name, path in runs.items()}
        colour = plots.colours([row["model"] for row in table], lines)
        plots.save(plots.comparison(table, colour), partial / "comparison.png")
        plots.save(plots.loss_curves(lines, colour), partial / "loss_curves.png")
        images = {name: base64.b64encode((partial / f"{name}.png").read_bytes()).decode() for name in PLOTS}
        (partial / PAGE).write_text(_page(lines, table, facts, samples, images), encoding="utf-8")
    return directory / PAGE


def _page(
    lines: dict[str, plots.Lines],
    table: list[Row],
    facts: dict[str, str],
    samples: list[dict[str, str]],
    images: dict[str, str],
) -> str:
    """Return the page's HTML, with every value escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    winners = {column.key: best(table, column) for column in COLUMNS}
    rows = [
        {"model": r["model"], "cells": [(c.form(r.get(c.key)), r["model"] in winners[c.key]) for c in COLUMNS]}
        for r in table
    ]
    return template.render(
        finding=finding(table),
        columns=COLUMNS,
        rows=rows,
        runs=[{"name": name, "cells": _effort(of_run)} for name, of_run in lines.items() if of_run],
        silent=[name for name, of_run in lines.items() if not of_run],
        facts=facts,
        samples=[{**s, "text": s["text"].removeprefix(s["prompt"])} for s in samples],
        **images,
    )


def _effort(lines: plots.Lines) -> list[str]:
    """Return steps, tokens, time of the steps, median tokens/s and last training loss of a run."""
    steps = [line for line in lines if line.get("kind") == "train"]
    last: dict[str, Any] = steps[-1] if steps else {}
    rates = [rate for line in steps if (rate := finite(line.get("tokens_per_second"))) > 0]
    seconds = round(sum(s for line in steps if (s := finite(line.get("seconds"))) > 0))
    return [
        str(lines[-1].get("step", 0)),
        count(last.get("tokens", 0)),
        f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        f"{statistics.median(rates):,.0f}" if rates else "–",
        four_digits(last.get("lm_loss")),
    ]

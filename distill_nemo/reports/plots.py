"""Plots of loss curves and of the comparison, by Matplotlib's object API: no window, no global state. No torch."""

import math
import textwrap
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from distill_nemo.reports.comparison import COLUMNS, Row, best, four_digits, role
from distill_nemo.runtime.metrics_file import finite

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Lines = list[dict[str, Any]]  # of a metrics.jsonl
BLACK, GRAY, PALE = "#222222", "#8a8a8a", "#d9d9d9"
ROLE_COLOURS = {"teacher": BLACK, "initial": GRAY, "alone": "#d55e00", "distilled": "#0072b2"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind
STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.axisbelow": True,
    "grid.color": "#ebebeb",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a user's name is a dollar sign
}
PANELS = {"lm_loss": "LM loss, nats per token", "forward_kl": "forward KL to the teacher, nats per token"}
COMPARED = ("lm_loss", "forward_kl", "top1_agreement")
MAX_POINTS = 4000  # of a curve
LOG_RATIO = 30  # curves that span more than this get a logarithmic axis


@matplotlib.rc_context(STYLE)
def save(figure_: Figure, path: Path) -> None:
    """Write a PNG."""
    figure_.savefig(path, dpi=160, facecolor="white")


def colours(table_names: Iterable[str], run_names: Iterable[str]) -> dict[str, str]:
    """Return a colour for every name. A run and a table row share one if they are the only ones of their role."""
    keys: dict[str, str] = {}
    for names in (list(table_names), list(run_names)):
        roles = [role(name) for name in names]
        keys |= {n: r if r and roles.count(r) == 1 else n for n, r in zip(names, roles, strict=True)}
    others = cycle(OTHER_COLOURS)
    palette = {key: ROLE_COLOURS.get(key) or next(others) for key in dict.fromkeys(keys.values())}
    return {name: palette[key] for name, key in keys.items()}


@matplotlib.rc_context(STYLE)
def loss_curves(runs: dict[str, Lines], colour: dict[str, str]) -> dict[str, Figure]:
    """Plot held-out LM loss over tokens, with the training loss in a light colour, and held-out KL if measured."""
    measured = any(_series(lines, "eval", "forward_kl", "step")[0] for lines in runs.values())
    drawings = {}
    for name in ["lm_loss", "forward_kl"] if measured else ["lm_loss"]:
        drawings[name] = Figure(figsize=(5.4, 4), layout="constrained")
        _curves(drawings[name].subplots(), runs, name, colour)
    return drawings


@matplotlib.rc_context(STYLE)
def comparison(table: list[Row], colour: dict[str, str]) -> Figure:
    """Plot LM loss, forward KL and top-1 agreement of all models, a panel each, with every value beside its dot."""
    drawing = Figure(figsize=(9.6, 0.9 + 0.42 * max(len(table), 2)), layout="constrained")
    panels = drawing.subplots(1, len(COMPARED), sharey=True)
    for axes, name in zip(panels, COMPARED, strict=True):
        _dots(axes, table, name, colour)
    names = [textwrap.fill(row["model"], 20) for row in table]
    panels[0].set_yticks(range(len(table)), names)
    panels[0].set_ylim(len(table) - 0.4, -0.6)
    return drawing


def _curves(axes: Axes, runs: dict[str, Lines], name: str, colour: dict[str, str]) -> None:
    clock, unit, label = _clock(runs.values())
    drawn: list[float] = []
    for run, lines in runs.items():
        train_x, train_y = _series(lines, "train", name, clock)
        x, y = _series(lines, "eval", name, clock)
        if train_x:
            light = {"color": colour[run], "alpha": 0.25, "linewidth": 0.9, "marker": "" if train_y[1:] else "."}
            axes.plot([t / unit for t in train_x], train_y, zorder=1, **light)
        if x:
            style = {"color": colour[run], "linewidth": 1.8, "marker": "o", "markersize": 4}
            axes.plot([t / unit for t in x], y, label=f"{run}  {four_digits(y[-1])}", **style)
        elif train_x:
            axes.plot([], [], color=colour[run], alpha=0.4, label=f"{run}  {four_digits(train_y[-1])} (training)")
        drawn += train_y + y
    drawn += _frozen_teacher(axes, runs) if name == "lm_loss" else []
    _finish(axes, drawn, PANELS[name], label)


def _frozen_teacher(axes: Axes, runs: dict[str, Lines]) -> list[float]:
    """Draw a dashed line at the loss of the teacher with which the last run was compared."""
    losses = [y for lines in runs.values() for y in _series(lines, "eval", "teacher_lm_loss", "step")[1]]
    if losses:
        trained_here = any(role(run) == "teacher" for run in runs)  # its own curve has the number
        label = "_" if trained_here else f"frozen teacher  {four_digits(losses[-1])}"
        axes.axhline(losses[-1], label=label, color=BLACK, linewidth=1, linestyle=(0, (4, 3)))
    return losses[-1:]


def _finish(axes: Axes, drawn: list[float], title: str, label: str) -> None:
    axes.set(title=title, xlabel=label)
    axes.grid(True)
    if not drawn:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=GRAY)
        axes.set(xticks=[], yticks=[])
        return
    positive = [y for y in drawn if y > 0]
    if positive and max(positive) > LOG_RATIO * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="held out, last value", alignment="left", loc="upper right")


def _clock(runs: Iterable[Lines]) -> tuple[str, float, str]:
    """Return key, unit and label of the x axis: tokens if every line has them, else steps."""
    lines = [line for run in runs for line in run if line.get("kind") in ("train", "eval")]
    if any(math.isnan(finite(line.get("tokens"))) for line in lines):
        return "step", 1.0, "optimizer step"
    most = max((finite(line["tokens"]) for line in lines), default=0.0)
    for size, word in ((1e12, "trillion "), (1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if most >= size / 2:
            return "tokens", size, f"{word}tokens trained on"
    return "tokens", 1.0, "tokens trained on"


def _series(lines: Lines, kind: str, name: str, clock: str) -> tuple[list[float], list[float]]:
    """Return the finite values of `name` and their clocks, as (clocks, values)."""
    of_kind = (line for line in lines if line.get("kind") == kind)
    pairs = [(finite(line.get(clock)), finite(line.get(name))) for line in of_kind]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    stride = -(-len(pairs) // MAX_POINTS) or 1
    pairs = [*pairs[: len(pairs) - 1 : stride], *pairs[-1:]]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _dots(axes: Axes, table: list[Row], name: str, colour: dict[str, str]) -> None:
    """Draw a dot for every model. A value far beyond the others is an arrow at the edge, so the others stay apart."""
    column = next(c for c in COLUMNS if c.key == name)
    values = [finite(row.get(name)) for row in table]
    low, high = (0.0, 1.0) if name == "top1_agreement" else _scale(values)
    room = 0.5 * (high - low)  # for the text beside the last dot
    winners = best(table, column)
    for y, (row, value) in enumerate(zip(table, values, strict=True)):
        if role(row["model"]) == "teacher" and low <= value <= high:
            axes.axvline(value, color=PALE, linewidth=1.2, zorder=1)
        beyond = value > high or row.get(name) == math.inf
        x = high + room if beyond else low if math.isnan(value) else value
        if beyond or not math.isnan(value):
            axes.plot([x], [y], ">" if beyond else "o", color=colour[row["model"]], markersize=9, clip_on=False)
        weight = "bold" if row["model"] in winners else "normal"
        place = {"xytext": (-9 if beyond else 9, 0), "ha": "right" if beyond else "left", "va": "center_baseline"}
        text = axes.annotate(column.form(row.get(name)), (x, y), textcoords="offset points", weight=weight, **place)
        text.set_bbox({"color": "white", "pad": 1})
    better = "higher" if column.better is max else "lower"
    axes.set_title(f"{column.title}\n{column.unit}, {better} is better")
    axes.set_xlim(low - 0.1 * (high - low), high + room)
    if name == "top1_agreement":
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    else:
        axes.set_xticks([x for x in MaxNLocator(3).tick_values(low, high) if low <= x <= high])
    axes.grid(True, axis="y")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)


def _scale(values: list[float]) -> tuple[float, float]:
    """Return the least and greatest value to draw to scale, without those far above the rest if more than three."""
    known = sorted(value for value in values if not math.isnan(value)) or [0.0]
    while len(known) > 3 and known[-1] - known[-2] > 2 * (known[-2] - known[0]):
        known.pop()
    low, high = known[0], known[-1]
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))

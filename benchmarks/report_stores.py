"""Sections of docs/performance.md on teacher stores, and the plot of their quality."""

from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from distill_nemo.reports import plots

Found = dict[str, Any]
LIMITS = {"plain LM training": ("student step", 1.05), "online distillation": ("distill-nemo", 0.55)}
COLOURS = {"top": "#d55e00", "sampled": "#0072b2", "hidden": "#009e73"}
ONLINE, METRICS = "full KL, online", {"lm_loss": "LM loss", "forward_kl": "KL to the teacher"}


def costs(found: Found) -> str:
    """Return bytes of a token and the rate of reading, and what a step takes."""
    vocabularies = list(next(iter(found["codecs"].values())))
    rows = [
        [
            name,
            *(f"{of[v]['bytes']:,.1f}" for v in vocabularies),
            *(f"{of[v]['tokens_per_second']:,.0f}" if "tokens_per_second" in of[v] else "" for v in vocabularies[-1:]),
        ]
        for name, of in found["codecs"].items()
    ]
    heads = ["bytes per token", *(f"V = {int(v):,}" for v in vocabularies), "read, tokens/s"]
    return f"{_table(heads, rows)}\n{_step(found['step'], found['short windows'])}"


def _step(step: Found, short: dict[str, float]) -> str:
    seconds = {name: way["processor_seconds"] for name, way in step["ways"].items()}
    stored = seconds["stored targets"]
    (layers, width, _), (student_layers, student_width, _) = step["teacher"], step["student"]
    ratios = [f"{stored / seconds[way]:.2f} of {name} (goal: at most {limit})" for name, (way, limit) in LIMITS.items()]
    rate = step["tokens"] / stored
    return (
        f"A step from stored targets of {step['draws']} draws takes {' and '.join(ratios)} in processor time: the "
        f"quickstart's pair, a student of {student_layers} x {student_width} and a teacher of {layers} x {width}, "
        f"V = {step['vocabulary']:,}. It takes {rate:,.0f} tokens a second. Windows of its length are read at "
        f"{short['tokens_per_second']:,.0f}, {short['tokens_per_second'] / rate:,.0f} times as fast (goal: 20).\n"
    )


def quality(found: Found) -> str:
    """Return means over seeds, and how far they are from online distillation's of the same seed."""
    rows, sizes = by_way(found), found["bytes"]
    seeds = sorted(rows[ONLINE])
    table = []
    for way, runs in rows.items():
        cells = [way, f"{sizes[way]:,.0f}" if sizes.get(way) else ""]
        for metric in METRICS:
            apart = [runs[seed][metric] - rows[ONLINE][seed][metric] for seed in seeds]
            cells += [f"{mean(run[metric] for run in runs.values()):.4f}", ", ".join(f"{x:+.4f}" for x in apart)]
        cells.append(f"{mean(run['top1_agreement'] for run in runs.values()):.2%}")
        table.append(cells)
    heads = ["targets", "bytes per token"]
    for name in METRICS.values():
        heads += [name, "minus online's, per seed"]
    tokens = found["steps"] * 16 * 128
    return f"{found['steps']} steps, {tokens:,} tokens.\n\n{_table([*heads, 'top-1 agreement'], table)}"


def by_way(found: Found) -> dict[str, dict[int, dict[str, float]]]:
    """Return the metrics of each run by way and seed."""
    ways: dict[str, dict[int, dict[str, float]]] = {}
    for row in found["rows"]:
        ways.setdefault(row["way"], {})[row["seed"]] = row
    return ways


@matplotlib.rc_context(plots.STYLE)
def quality_plot(found: Found) -> Figure:
    """Plot the KL to the teacher of each run by the bytes of a token in its store; without one, as lines."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(20, 3000), xticks=[30, 100, 300, 1000])
    axes.set(
        title="A dot per seed; lines: mean over seeds",
        xlabel="bytes per token",
        ylabel="held-out KL to the teacher, nats per token",
    )
    for way, runs in by_way(found).items():
        values = [run["forward_kl"] for run in runs.values()]
        if size := found["bytes"].get(way):
            colour = COLOURS[way.split(",")[0].split("-")[0]]
            face = "white" if "renormalised" in way else colour  # of the same size as those with the tail
            axes.plot([size] * len(values), values, "o", color=colour, markerfacecolor=face, markersize=5)
            axes.text(1.1 * size, max(values), way, color=colour, va="center")
        else:
            axes.axhline(mean(values), color=plots.GRAY, linestyle=(0, (4, 3)), linewidth=1)
            below = way == ONLINE
            axes.text(2900, mean(values) + (-0.01 if below else 0.01), way, ha="right", va="top" if below else "bottom")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *rows])

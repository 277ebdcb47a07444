"""docs/performance.md and its plot from benchmarks/results/*.json: nothing in it is written by hand."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PLOT = (
    ROOT / "benchmarks" / "results",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "performance.png",
)
OURS, NOT_MEASURED = "distill-nemo", "not measured"
STUDENT, TEACHER = "student step", "teacher forward"
HEAD = """# Performance

Written by `make bench` from benchmarks/results/*.json. Forward and backward of KL(teacher‖student), of bf16 logits that
are given, or of hidden states (fused linear). Ways take turns in one process; figures are medians. Wall time is
what a busy machine gives; processor time is what the work took. Memory of the rows with given logits is the peak beyond
inputs and gradient, in units of one fp32 tensor of the logits.
"""


def main() -> None:
    """Write both."""
    parts = [HEAD, _cpu(), _two_ranks(), _gpu(), _scaling(), _fused_cpu(), _fused_gpu(), _step()]
    PAGE.write_text("\n".join(parts))
    _plot()
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


def _load(kind: str, what: str = "kl") -> dict[str, Any] | None:
    path = RESULTS / f"{what}_{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N | V | | wall time, s | processor time, s | ours / this, wall | ours / this, processor | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["ways"][OURS]
        for name, way in row["ways"].items():
            times = [way["seconds"], way["processor_seconds"]]
            ratios = [ours["seconds"] / times[0], ours["processor_seconds"] / times[1]]
            cells = [row["tokens"], f"{row['vocabulary']:,}", name, *(f"{x:.4f}" for x in times)]
            cells += [*(f"{x:.2f}" for x in ratios), f"{max(0.0, way['extra_memory']):.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{device}; torch {machine['torch']}; {machine['threads']} thread(s) a process; medians of {found['repeats']}; "
        f"load average {machine['load_average']:.0f}.\n"
    )


def _cpu() -> str:
    found = _load("cpu")
    title = (
        "## CPU, one process\nGoal: at most 0.12 of ModelOpt's time and 1.0 of torch.compile's, memory at most 0.1.\n"
    )
    if found is None:
        return f"{title}\n{NOT_MEASURED}\n"
    rows = [row for row in found["rows"] if len(row["ways"]) > 1]
    return f"{title}\n{_where(found)}\n{_table(rows)}\n![Time of each way](performance.png)\n"


def _two_ranks() -> str:
    found = _load("two_ranks")
    title = (
        "## CPU, vocabulary over two gloo ranks\nGoal: at most 0.20 of ModelOpt's time. One all-gather in ours "
        "(tests/distributed/test_vocab_parallel.py counts it). The slower rank's figures; memory in its shards.\n"
    )
    return f"{title}\n{NOT_MEASURED}\n" if found is None else f"{title}\n{_where(found)}\n{_table(found['rows'])}"


def _gpu() -> str:
    found = _load("gpu")
    title = (
        "## GPU, N = 8192, V = 128,256\nGoal on an H200: 85 % of the bandwidth of a copy for 10 bytes per element; "
        "5 times ModelOpt; twice Liger's best.\n"
    )
    if found is None:
        return (
            f"{title}\n| | |\n|---|---|\n| time, share of copy bandwidth, memory; ModelOpt, Liger, torch.compile | "
            f"{NOT_MEASURED} |\n\n"
            "`python -m benchmarks.kl` measures it on a machine with a GPU (`pip install liger-kernel`).\n"
        )
    row = found["rows"][0]
    achieved = 10 * row["tokens"] * row["vocabulary"] / row["ways"][OURS]["seconds"]
    share = achieved / row["copy_bytes_per_second"]
    return f"{title}\n{_where(found)}\n{_table([row])}\nShare of a copy's bandwidth: {share:.0%}.\n"


def _scaling() -> str:
    found = _load("cpu")
    title = "## Scaling of ours\n"
    if found is None:
        return f"{title}\n{NOT_MEASURED}\n"
    times = {(r["tokens"], r["vocabulary"]): r["ways"][OURS]["processor_seconds"] for r in found["rows"]}
    per_element = {shape: 1e9 * seconds / (shape[0] * shape[1]) for shape, seconds in times.items()}
    lines = ["| N | V | processor time, s | ns per element |", "|---|---|---|---|"]
    lines += [f"| {n} | {v:,} | {times[n, v]:.4f} | {per_element[n, v]:.2f} |" for n, v in sorted(times)]
    (base, more_n), more_v = ((512, 32000), (1024, 32000)), (1024, 64000)
    by_n, by_v = times[more_n] / times[base], times[more_v] / times[more_n]
    return f"{title}\n" + "\n".join(lines) + f"\n\nTime when N doubles: x {by_n:.2f}; when V doubles: x {by_v:.2f}.\n"


def _fused_cpu() -> str:
    found = _load("cpu", "fused_linear")
    title = (
        "## Fused linear, CPU, N = 2048, H = 1024 and 2048, V = 128,256\nFrom bf16 hidden states and output weights to "
        "gradients, the weight's added to an fp32 `main_grad`. Goal: at most 1.05 of the time of the matrix products "
        "with our KL of their logits, at most 0.05 of the memory with ModelOpt's KL.\n"
    )
    return (
        f"{title}\n{NOT_MEASURED}\n" if found is None else f"{title}\n{_where(found)}\n{_fused_table(found['rows'][0])}"
    )


def _fused_gpu() -> str:
    found = _load("gpu", "fused_linear")
    title = (
        "## Fused linear, GPU, N = 8192, H = 4096, V = 128,256\nGoal on an H200: at most 1.10 of the matrix products "
        "alone; below Liger's time and memory.\n"
    )
    if found is None:
        return (
            f"{title}\n{NOT_MEASURED}\n\n`python -m benchmarks.fused_linear` measures it on a machine with a GPU "
            "(`pip install liger-kernel`).\n"
        )
    return f"{title}\n{_where(found)}\n{_fused_table(found['rows'][0])}"


def _fused_table(row: dict[str, Any]) -> str:
    """Memory is beyond inputs and both gradients."""
    lines = [
        "| | wall time, s | processor time, s | GFLOP/s of the products | ours / this, wall | ours / this, processor "
        "| memory, MiB | ours / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = row["ways"][OURS]
    for name, way in row["ways"].items():
        cells = [name, f"{way['seconds']:.1f}", f"{way['processor_seconds']:.1f}"]
        cells += [f"{row['flops'] / way['processor_seconds'] / 1e9:.0f}"]
        cells += [f"{ours[key] / way[key]:.2f}" for key in ("seconds", "processor_seconds")]
        cells += [f"{way['extra_bytes'] / 2**20:,.0f}", f"{ours['extra_bytes'] / max(1, way['extra_bytes']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step() -> str:
    title = (
        "## A distillation step\nA step of the training loop, beside a teacher's forward pass and a step of the same "
        "student alone (whole logits, Megatron's cross entropy), and beside ModelOpt's plugin in the same loop on the "
        "same layers. Goal: at most 1.03 of the parts; on CPU 1.3 times the plugin's speed, on a GPU 1.15 times.\n"
    )
    parts = [title]
    for kind, name in (("cpu", "CPU"), ("gpu", "GPU")):
        found = _load(kind, "step")
        parts.append(f"### {name}\n" + (f"{_where(found)}\n{_step_table(found['rows'][0])}" if found else _NO_STEP))
    return "\n".join(parts)


_NO_STEP = f"{NOT_MEASURED}: `python -m benchmarks.step` does on a machine with a GPU.\n"


def _step_table(row: dict[str, Any]) -> str:
    """Memory is what a step needs beyond what lies there between steps."""
    ways = row["ways"]
    keys = ("seconds", "processor_seconds")
    ours, parts = ways[OURS], {key: ways[TEACHER][key] + ways[STUDENT][key] for key in keys}
    (layers, width, _), (students_layers, students_width, _) = row["teacher"], row["student"]
    lines = [
        f"Teacher {layers} x {width}, student {students_layers} x {students_width}, V = {row['vocabulary']:,}, "
        f"{row['tokens']:,} tokens, {row['dtype']}.\n",
        "| | wall time, s | processor time, s | this / ours, wall | this / ours, processor | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in [*ways.items(), (f"{TEACHER} + {STUDENT}", parts)]:
        cells = [name, *(f"{way[key]:.3f}" for key in keys), *(f"{way[key] / ours[key]:.2f}" for key in keys)]
        cells.append(f"{way['extra_bytes'] / 2**20:,.0f}" if "extra_bytes" in way else "")
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + f"\n\nOurs is {ours['seconds'] / parts['seconds']:.2f} of its parts in wall time, "
        + f"{ours['processor_seconds'] / parts['processor_seconds']:.2f} in processor time.\n"
    )


def _plot() -> None:
    panels = [
        (title, row)
        for title, kind in (("one process", "cpu"), ("two ranks", "two_ranks"), ("GPU", "gpu"))
        for row in (_load(kind) or {"rows": []})["rows"]
        if len(row["ways"]) > 1
    ]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(3 * max(1, len(panels)), 3), squeeze=False)
    for axis, (title, row) in zip(axes[0], panels, strict=False):
        ways = row["ways"]
        axis.bar(range(len(ways)), [1e3 * way["processor_seconds"] for way in ways.values()], color="#4477aa")
        axis.set_xticks(range(len(ways)), list(ways), rotation=40, ha="right")
        axis.set_title(f"{title}, V = {row['vocabulary']:,}", fontsize=9)
    axes[0][0].set_ylabel("processor time, ms")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()

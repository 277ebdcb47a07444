"""Write docs/performance.md and the plots from benchmarks/results/*.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.prepare import CASES, MASKED, WAYS
from benchmarks.report_stores import costs, quality, quality_plot
from distill_nemo.reports import plots

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PLOT, STORES_PLOT = (ROOT / "docs" / name for name in ("performance.md", "performance.png", "teacher_store.png"))
OURS, NOT_MEASURED = "distill-nemo", "not measured"
STUDENT, TEACHER, MODELOPT = "student step", "teacher forward", "ModelOpt"
MEMORY = ("extra_bytes", "tensor_bytes", "logits_bytes")
SHADES = ("#0072b2", "#7fb8d8")
HEAD = """# Performance

Written by `make bench` from benchmarks/results/*.json. It measures forward and backward of KL(teacher‖student), for
given bf16 logits or from hidden states (fused linear). Alternatives take turns in one process; values are medians.
Wall time depends on the machine's load; processor time is the work itself. Memory in the rows with given logits is the
peak beyond inputs and gradient, in units of one fp32 tensor of the logits.
"""


def main() -> None:
    """Write the page and the plots."""
    parts = [HEAD, *(_section(*section) for section in SECTIONS)]
    PAGE.write_text("\n".join(parts))
    plots.save(_times(), PLOT)
    plots.save(quality_plot(_load("teacher_quality")[0]), STORES_PLOT)
    print(f"wrote {', '.join(str(path.relative_to(ROOT)) for path in (PAGE, PLOT, STORES_PLOT))}")


def _section(title: str, what: str, module: str, body: Callable[[dict[str, Any]], str]) -> str:
    """Return the results of each machine."""
    found = _load(what)
    parts = [f"### {_where(each)}\n{body(each)}" for each in found]
    command = "make gpu" if "gpu" in what else f"python -m benchmarks.{module}"
    return "\n".join([title, *(parts or [f"{NOT_MEASURED}; `{command}` measures it.\n"])])


def _load(what: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{what}_*.json"))]


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
            cells += [*(f"{x:.2f}" for x in ratios), f"{round(way['extra_memory'], 2) + 0.0:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    medians = f"; medians of {found['repeats']}" if "repeats" in found else ""
    return (
        f"{device}\ntorch {machine['torch']}; {machine['threads']} thread(s) a process{medians}; "
        f"load average {machine['load_average']:.0f}.\n"
    )


def _clock(found: dict[str, Any]) -> str:
    """Return the clock that measures the work: wall time on a GPU, whose processor is mostly idle."""
    return "seconds" if found["machine"]["gpu"] else "processor_seconds"


def _given_logits(found: dict[str, Any]) -> str:
    return _table([row for row in found["rows"] if len(row["ways"]) > 1])


def _scaling(found: dict[str, Any]) -> str:
    times = {(r["tokens"], r["vocabulary"]): r["ways"][OURS]["processor_seconds"] for r in found["rows"]}
    lines = ["| N | V | processor time, s | ns per element |", "|---|---|---|---|"]
    lines += [f"| {n} | {v:,} | {times[n, v]:.4f} | {1e9 * times[n, v] / (n * v):.2f} |" for n, v in sorted(times)]
    by_n = next(times[2 * n, v] / times[n, v] for n, v in times if (2 * n, v) in times)
    by_v = next(times[n, 2 * v] / times[n, v] for n, v in times if (n, 2 * v) in times)
    return "\n".join(lines) + f"\n\nTime when N doubles: x {by_n:.2f}; when V doubles: x {by_v:.2f}.\n"


def _on_gpu(found: dict[str, Any]) -> str:
    row = found["rows"][0]
    achieved = 10 * row["tokens"] * row["vocabulary"] / row["ways"][OURS]["seconds"]
    share = achieved / row["copy_bytes_per_second"]
    return f"{_table([row])}\nShare of a copy's bandwidth: {share:.0%}.\n"


def _fused(found: dict[str, Any]) -> str:
    """Return the table of fused losses. Memory is that beyond inputs and both gradients."""
    (row,) = found["rows"]
    lines = [
        "| | wall time, s | processor time, s | GFLOP/s of the products | ours / this, wall | ours / this, processor "
        "| memory, MiB | ours / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = row["ways"][OURS]
    lines.insert(0, f"{row['dtype']}.\n")
    for name, way in row["ways"].items():
        cells = [name, f"{way['seconds']:.1f}", f"{way['processor_seconds']:.1f}"]
        cells += [f"{row['flops'] / way[_clock(found)] / 1e9:.0f}"]
        cells += [f"{ours[key] / way[key]:.2f}" for key in ("seconds", "processor_seconds")]
        cells += [f"{way['extra_bytes'] / 2**20:,.0f}", f"{ours['extra_bytes'] / max(1, way['extra_bytes']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    part = "a quarter of tokens and vocabulary and half of the widths"
    return "\n".join(lines) + f"\n\nOur scaling from {part}: {_doubled(found['scaling'], _clock(found))}.\n"


def _doubled(scaling: dict[str, dict[str, float]], clock: str) -> str:
    """Return the growth of time with each size."""
    times, operations = (
        {name: x[key] / scaling["once"][key] for name, x in scaling.items()} for key in (clock, "flops")
    )
    each = [f"{name} x {times[name]:.2f} (operations x {operations[name]:.2f})" for name in times if name != "once"]
    return f"time when one doubles, {', '.join(each)}"


def _step(found: dict[str, Any]) -> str:
    """Return the table of steps. Memory is that of a step beyond the memory between steps."""
    (row,) = found["rows"]
    ways = row["ways"]
    keys = ("seconds", "processor_seconds")
    ours, parts = ways[OURS], {key: ways[TEACHER][key] + ways[STUDENT][key] for key in keys}
    (layers, width, _), (students_layers, students_width, _) = row["teacher"], row["student"]
    tied = ", tied embeddings" if row["tied"] else ""
    lines = [
        f"Teacher {layers} x {width}, student {students_layers} x {students_width}, V = {row['vocabulary']:,}{tied}, "
        f"{row['tokens']:,} tokens, {row['dtype']}.\n",
        "| | wall time, s | processor time, s | this / ours, wall | this / ours, processor | memory, MiB "
        "| tensors | of them as large as the logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, way in [*ways.items(), (f"{TEACHER} + {STUDENT}", parts)]:
        cells = [name, *(f"{way[key]:.3f}" for key in keys), *(f"{way[key] / ours[key]:.2f}" for key in keys)]
        cells += [f"{way[key] / 2**20:,.0f}" if key in way else "" for key in MEMORY]
        lines.append(f"| {' | '.join(cells)} |")
    smaller = [f"{(ways[x]['tensor_bytes'] - ways[x]['logits_bytes']) / 2**20:,.0f} MiB" for x in (OURS, MODELOPT)]
    return (
        "\n".join(lines)
        + f"\n\nOurs is {ours['seconds'] / parts['seconds']:.2f} of its parts in wall time, "
        + f"{ours['processor_seconds'] / parts['processor_seconds']:.2f} in processor time. "
        + f"Tensors smaller than the logits take {smaller[0]} of ours and {smaller[1]} of the plugin's peak. "
        + f"Our scaling from half of layers, tokens and vocabulary: {_doubled(row['scaling'], _clock(found))}.\n"
    )


def _convert(found: dict[str, Any]) -> str:
    """Return every rank's rows, bytes from the disk, and the directory of many tensors."""
    cold: dict[str, int] = {}
    lines = [
        "| | | processor time, s | ours / this | extra memory, of the rank's part |",
        "|---|---|---|---|---|",
    ]
    for rank, ways in found["rows"].items():
        part, cold[rank] = ways.pop("part")["bytes"], ways.pop("cold")["disk_bytes"]
        for name, way in ways.items():
            ours = ways["export" if name.startswith(("export", "the file")) else "import"]
            ratio = ours["processor_seconds"] / way["processor_seconds"]
            lines.append(
                f"| {rank} | {name} | {way['processor_seconds']:.2f} | {ratio:.2f} | {way['extra_bytes'] / part:.2f} |"
            )
    many, whole = found["many tensors"], found["file_bytes"]
    shares = ", ".join(f"{rank}: {size / whole:.2f}" for rank, size in cold.items())
    return (
        "\n".join(lines)
        + f"\n\nBytes that the disk reads for an import, of those of the file, not in memory before: {shares}."
        + f"\n\nEvery tensor of a directory of {many['tensors']:,} in 118 files: {many['ours']:.1f} s, by ModelOpt's "
        + f"importer {many['ModelOpt']:.0f} s (from every 360th).\n"
    )


def _prepare(found: dict[str, Any]) -> str:
    """Return every way's rows, by corpus and size of the vocabulary, ours first, and the cases that are missing."""
    lines = [
        f"JSON lines; {found['workers']} workers. {found.get('note', '')}\n",
        "| corpus | vocabulary | | wall time, s | processor time, s | ours / this, wall | ours / this, processor |",
        "|---|---|---|---|---|---|---|",
    ]
    ours: dict[str, Any] = {}
    for row in found["rows"]:
        ours = row if row["way"] == OURS else ours
        ratios = " | ".join(f"{ours[name] / row[name]:.2f}" for name in ("seconds", "processor_seconds"))
        lines.append(
            f"| {row['kind']}, {row['bytes'] / 1e6:.0f} MB | {row['vocabulary']:,} | {row['way']} "
            f"| {row['seconds']:.1f} | {row['processor_seconds']:.1f} | {ratios} |"
        )
    done = {(row["kind"], row["tokenizer"], row["way"]) for row in found["rows"]}
    missing = []
    for kind, size in CASES:
        ways = [way for way in WAYS if (kind, size, way) not in done and (way != MASKED or kind == "chats")]
        missing += [f"{kind} with the {size} tokenizer by {', '.join(ways)}"] if ways else []
    return "\n".join(lines) + (f"\n\nNot measured: {'; '.join(missing)}.\n" if missing else "\n")


@matplotlib.rc_context(plots.STYLE)
def _times() -> Figure:
    """Plot the time of each implementation over ours, a panel for each setting and machine."""
    settings = ("one process", "kl_cpu"), ("two tensor-parallel ranks", "kl_two_ranks"), ("GPU", "kl_gpu")
    panels = [(title, found) for title, what in settings for found in _load(what)]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _bars(axes, f"{title}, {found['machine']['gpu'] or found['machine']['cpu']}", found)
    return figure


def _bars(axes: Axes, title: str, found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if len(row["ways"]) > 1]
    clock, height = _clock(found), 0.8 / len(rows)
    for place, row in enumerate(rows):
        ratios = [way[clock] / row["ways"][OURS][clock] for way in row["ways"].values()]
        where = [number + place * height for number in range(len(ratios))]
        label = f"V = {row['vocabulary']:,}"
        bars = axes.barh(where, ratios, 0.9 * height, color=SHADES[place % len(SHADES)], label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks([number + 0.4 - height / 2 for number in range(len(rows[0]["ways"]))], list(rows[0]["ways"]))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(left=False)
    clock_name = "wall time" if clock == "seconds" else "processor time"
    axes.set(title=title, xlabel=f"{clock_name} relative to {OURS}")
    axes.legend(loc="best")


SECTIONS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    (
        "## Given logits, CPU, one process\nGoal: at most 0.12 of ModelOpt's time and 1.0 of torch.compile's, memory "
        "at most 0.1.\n\n![Time of each implementation relative to distill-nemo](performance.png)\n",
        "kl_cpu",
        "kl",
        _given_logits,
    ),
    (
        "## Given logits, CPU, vocabulary over two gloo ranks\nGoal: at most 0.20 of ModelOpt's time. One all-gather "
        "in ours (tests/distributed/losses/test_vocab_parallel.py counts it). All values are the slower rank's; "
        "memory is in units of its shards.\n",
        "kl_two_ranks",
        "kl",
        _given_logits,
    ),
    (
        "## Given logits, GPU, N = 8192, V = 128,256\nGoal on an H200: 85 % of the bandwidth of a copy for 10 bytes "
        "per element; 5 times ModelOpt; twice Liger's best.\n",
        "kl_gpu",
        "kl",
        _on_gpu,
    ),
    ("## Given logits, how our time scales\n", "kl_cpu", "kl", _scaling),
    (
        "## Fused linear, CPU, N = 2048, H = 1024 and 2048, V = 128,256\nFrom hidden states and output weights to "
        "gradients, the weight's added to an fp32 `main_grad`. Goal: at most 1.05 of the time of the matrix products "
        "with our KL of their logits, at most 0.05 of the memory with ModelOpt's KL.\n",
        "fused_linear_cpu",
        "fused_linear",
        _fused,
    ),
    (
        "## Fused linear, GPU, N = 8192, H = 4096, V = 128,256\nGoal on an H200: at most 1.10 of the matrix products "
        "alone; below Liger's time and memory.\n",
        "fused_linear_gpu",
        "fused_linear",
        _fused,
    ),
    (
        "## Hugging Face directories, CPU, a Llama of 302M in bf16\nGoal: at most 0.5 of the time of ModelOpt's "
        "import, extra memory at most 0.1 of a rank's part; an export in at most 1.2 of the time that reading and "
        "writing take.\n",
        "convert_cpu",
        "convert",
        _convert,
    ),
    (
        "## Tokenisation\nWhole programs, start included. The batch call keeps nothing. Ours finds out which tokens of "
        "a chat count, as does the last way. Goal: at most 1.05 of the batch call's time, and less than the others'.\n",
        "prepare",
        "prepare",
        _prepare,
    ),
    (
        "## A distillation step, CPU\nA step of the training loop, beside a teacher's forward pass and a step of the "
        "same student alone (whole logits, Megatron's cross entropy), and beside ModelOpt's plugin in the same loop, "
        "on the same layers and on Megatron's own. Goal: at most 1.03 of the parts; 1.3 times the plugin's speed.\n",
        "step_cpu",
        "step",
        _step,
    ),
    (
        "## A distillation step, GPU\nGoal: as on CPU; 1.15 times the plugin's speed.\n",
        "step_gpu",
        "step",
        _step,
    ),
    (
        "## Teacher stores, cost\nEverything in the shards, by the number of tokens, all of which count. Distributions "
        "are Zipf's with exponent 1.5 (2.8 nats at V = 2,048, 3.2 at V = 151,936). Megatron-LM: its cached logits, 17 "
        "bits of an id and an fp16 log-probability. DistillKit: its compressed logits. Reading is random access in "
        "windows of 1,024 tokens, in processor time, from files in memory.\n",
        "teacher_store",
        "teacher_store",
        costs,
    ),
    (
        "## Teacher stores, quality\nThe quickstart's student, trained on the same windows in the same order from the "
        "same initial weights; only the targets differ. Three seeds of weights and order share the stores. Held-out "
        "windows; means over seeds.\n\n![KL to the teacher by bytes of a token](teacher_store.png)\n",
        "teacher_quality",
        "teacher_quality runs/quickstart",
        quality,
    ),
]

if __name__ == "__main__":
    main()

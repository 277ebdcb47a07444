"""Cut the quickstart's teacher by activations, by magnitude and at random; measure each cut, and distil it.

`python -m benchmarks.pruning runs/quickstart` after `make quickstart`. Beside the cuts, a student of the same size with
random weights is distilled on the same tokens. It writes results/pruning.json, docs/pruning.png and docs/pruning.md's
table. The same command goes on after the last row that it wrote.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from benchmarks.measure import RESULTS
from distill_nemo.config import ParallelismConfig, PruneConfig, StudentConfig, TeacherConfig
from distill_nemo.config_files import load_yaml
from distill_nemo.reports import plots
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.files import write_atomically
from distill_nemo.runtime.process_groups import process_groups

Metrics = dict[str, float]
Row = dict[str, Any]  # one student
METRICS = ("lm_loss", "forward_kl", "top1_agreement")
RANDOM_WEIGHTS = "random weights"  # not cut, beside the cuts
COLOURS = {"activations": "#0072b2", "magnitude": "#e69f00", "random": plots.GRAY, RANDOM_WEIGHTS: "#d55e00"}
PAGE, PLOT = (Path(__file__).parents[1] / "docs" / name for name in ("pruning.md", "pruning.png"))
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
LR_OF_CUTS, LR_OF_RANDOM_WEIGHTS = 5e-4, 2e-3  # half of the teacher's, and the quickstart's students'
HELD_OUT, LENGTH = 64, 128
SIZES = {  # by fraction of the teacher's parameters
    0.7: {"num_layers": 3, "ffn_hidden_size": 576},
    0.5: {"num_layers": 3, "hidden_size": 192, "ffn_hidden_size": 512, "num_query_groups": 3},
    0.35: {"num_layers": 3, "hidden_size": 160, "ffn_hidden_size": 320},
}
OF_LAYERS = ("heads", "ffn")


def by_activations(model: Any, data: str, cache: Path) -> Any:
    """Return the scores that `nemo distill prune` computes."""
    from distill_nemo.models.provider import model_provider
    from distill_nemo.pruning.calibration import Calibration

    config = PruneConfig("", "", data, samples=256, sequence_length=LENGTH)
    calibration = Calibration.of(config, model.vocab_size, cache)
    return calibration.scores(model_provider(student=model, parallelism=ParallelismConfig()), model)  # pyright: ignore


def by_magnitude(model: Any) -> Any:
    """Return the norm of all weights of a part."""
    from distill_nemo.models.checkpoints.hf_tensors import PieceReader
    from distill_nemo.models.families.pieces import Piece
    from distill_nemo.models.families.tensors import hf_axes
    from distill_nemo.pruning.choice import Scores

    sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
    with PieceReader(model.source.tensors) as reader:
        for name, dimensions in hf_axes(model).items():
            whole = Piece(name, tuple(slice(0, sum(span.size for span in spans)) for spans in dimensions))
            squares, inside = reader.read(whole).double().square(), re.search(r"layers\.(\d+)", name)
            layer = int(inside[1]) if inside else -1
            sums["layers", layer] = sums["layers", layer] + squares.sum()
            for axis, spans in enumerate(dimensions):
                others = [other for other in range(squares.dim()) if other != axis]
                key = spans[0].axis, layer if spans[0].axis in OF_LAYERS else 0
                sums[key] = sums[key] + (squares.sum(dim=others) if others else squares)
    layers = range(model.num_layers)
    heads = {i: sums["heads", i].view(model.num_attention_heads, -1).sum(dim=1).sqrt() for i in layers}
    ffn = {i: sums["ffn", i].sqrt() for i in layers}
    absent: dict[str, Any] = {part: {} for part in ("mamba", "shared_ffn", "experts", "expert_ffn")}
    whole = torch.cat([sums["layers", i] for i in layers])
    return Scores(hidden=sums["hidden", 0].sqrt(), heads=heads, ffn=ffn, layers=whole, **absent)


def at_random(like: Any, seed: int) -> Any:
    """Return random scores of the shapes of `like`."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drawn(each) for key, each in value.items()}
        return torch.rand(value.shape, generator=generator, dtype=torch.float64)

    return type(like)(**{name: drawn(value) for name, value in vars(like).items()})


def write(model: Any, given: dict[str, int], scores: Any, output: Path) -> int:
    """Write the cut. Return its number of parameters."""
    from distill_nemo.models.checkpoints.export_files import export_files
    from distill_nemo.models.families.tensors import num_parameters
    from distill_nemo.pruning.choice import choose, kept_layers
    from distill_nemo.pruning.sizes import complete, smaller, with_source
    from distill_nemo.pruning.tensors import CutTensors, write_cut
    from distill_nemo.runtime.everyone import Everyone

    sizes = complete(model, given)
    cut = smaller(model, sizes, kept_layers(scores, sizes["num_layers"]))
    kept = choose(scores, model, cut, sizes)
    output.mkdir(parents=True)
    with CutTensors(model, cut, kept) as tensors:
        write_cut(tensors, output, Everyone())
    source = model.source.weights
    export_files(with_source(model, cut, kept.layers), torch.float32, source, None).write(output)
    return num_parameters(cut)


def distilled(student: StudentConfig, root: Path, setting: dict[str, int], seed: int) -> dict[str, Metrics]:
    """Distil a student as the quickstart does. Return its held-out metrics against the teacher, before and after."""
    from distill_nemo.training.entry import run_config

    config = load_yaml(root / "teacher/config.yaml")
    config = replace(config, student=student, teacher=TeacherConfig(checkpoint=str(root / "teacher/student")))
    steps, batch, lr = setting["steps"], setting["batch"], LR_OF_CUTS if student.checkpoint else LR_OF_RANDOM_WEIGHTS
    config.optimizer = replace(config.optimizer, lr=lr, min_lr=lr / 10, warmup_steps=min(20, steps // 2))
    config.training = replace(config.training, steps=steps, seed=seed, data_seed=seed, eval_interval=steps)
    config.training = replace(
        config.training, global_batch_size=batch, micro_batch_size=min(batch, 8), eval_batches=HELD_OUT // batch
    )
    config.checkpoint = replace(config.checkpoint, export=False)
    with tempfile.TemporaryDirectory() as output:
        run_config(replace(config, output_dir=output))
        lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if line["kind"] == "eval")
    return {when: {name: line[name] for name in METRICS} for when, line in (("before", first), ("after", last))}


def rows_of(root: Path, setting: dict[str, int], seeds: list[int], rows: list[Row]) -> Iterator[Row]:
    """Measure what `rows` lack, and yield it row by row."""
    from distill_nemo.models.resolve import resolve

    model = resolve(StudentConfig(checkpoint=str(root / "teacher/student")))
    with tempfile.TemporaryDirectory() as temporary:
        with process_groups(ParallelismConfig()):
            activations = by_activations(model, str(root / "data/train"), Path(temporary, "cache"))
        ways = {"activations": activations, "magnitude": by_magnitude(model)}
        known = {(row["fraction"], row["by"], row["seed"]): row for row in rows}
        for seed, fraction in product(seeds, SIZES):
            for by, scores in (ways | {"random": at_random(activations, seed), RANDOM_WEIGHTS: activations}).items():
                if (fraction, by, seed) in known:
                    continue
                cut = Path(temporary, f"{fraction} {by} {seed}")
                with process_groups(ParallelismConfig()):
                    count = write(model, SIZES[fraction], scores, cut)
                student = StudentConfig(checkpoint=str(cut))
                if by == RANDOM_WEIGHTS:
                    student = replace(resolve(student).filled(StudentConfig()), checkpoint=None)
                row = {"fraction": fraction, "parameters": count, "by": by, "seed": seed}
                yield row | distilled(student, root, setting, seed)


def write_page(setting: dict[str, int], rows: list[Row]) -> None:
    """Draw the plot, and write the table of docs/pruning.md."""
    plots.save(drawn(rows, setting), PLOT)
    head = ["parameters", "cut by", "KL before", "KL after", "LM loss after"]
    lines = [head, ["---"] * len(head), *(_line(rows, fraction, by) for fraction, by in product(SIZES, COLOURS))]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1])


def _line(rows: list[Row], fraction: float, by: str) -> list[str]:
    own = [row for row in rows if row["fraction"] == fraction and row["by"] == by]

    def seeds(when: str, name: str) -> str:
        values = [f"{row[when][name]:.3f}" for row in own]
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    columns = ("before", "forward_kl"), ("after", "forward_kl"), ("after", "lm_loss")
    return [f"{own[0]['parameters'] / 1e6:.2f}M", by, *(seeds(*column) for column in columns)]


@matplotlib.rc_context(plots.STYLE)
def drawn(rows: list[Row], setting: dict[str, int]) -> Figure:
    """Plot the KL of every student over its parameters, with a line through the means over seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    tokens = setting["steps"] * setting["batch"] * setting["sequence_length"]
    titles = {"before": "before distillation", "after": f"after distillation of {tokens:,} tokens"}
    for axes, (when, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for by, colour in COLOURS.items():
            own = [row for row in rows if row["by"] == by]
            points = [(row["parameters"] / 1e6, row[when]["forward_kl"]) for row in own]
            sizes = sorted({size for size, _ in points})
            means = [fmean(kl for size, kl in points if size == each) for each in sizes]
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
            axes.plot(sizes, means, color=colour, label="not cut: random weights" if by == RANDOM_WEIGHTS else by)
        axes.set(title=title, xlabel="million parameters", yscale="log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True)
    first = figure.axes[0]
    first.set_ylabel("held-out forward KL to the teacher, nats per token")
    first.legend(title="cut by")
    return figure


def main() -> None:
    """Measure, and write results, plot and table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("root", type=Path, help="the quickstart's directory")
    parser.add_argument("--steps", type=int, default=24, help="of distillation")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens in a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of random choices and data order")
    parser.add_argument("--output", type=Path, default=RESULTS / "pruning.json")
    arguments = parser.parse_args()
    setting = {"steps": arguments.steps, "batch": arguments.batch, "sequence_length": LENGTH}
    written = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    if written.get("setting", setting) != setting:
        raise SystemExit(f"{arguments.output} holds {written['setting']}: remove it, or name another --output")
    setup_device()
    for row in rows_of(arguments.root.absolute(), setting, arguments.seeds, rows := written["rows"]):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_atomically(arguments.output, json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    if arguments.output.parent == RESULTS:
        write_page(setting, rows)


if __name__ == "__main__":
    main()

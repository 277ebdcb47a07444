"""Cut the quickstart's teacher by activations, by magnitude and at random; measure the cuts, at once and distilled.

`python -m benchmarks.pruning runs/quickstart` after `make quickstart`. With `--steps 160 --seeds 0 1 2` each cut is
also distilled.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import RESULTS
from distill_nemo.config import ParallelismConfig, PruneConfig, StudentConfig, TeacherConfig
from distill_nemo.config_files import load_yaml
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups

SAMPLES, LENGTH = 128, 128
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
    return Scores(sums["hidden", 0].sqrt(), heads, ffn, {}, {}, {}, torch.cat([sums["layers", i] for i in layers]))


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


def measured(student: Path, teacher: Path, root: Path) -> dict[str, float]:
    """Return held-out metrics against the teacher."""
    from distill_nemo.training.evaluate import evaluate_student

    of, against = StudentConfig(checkpoint=str(student)), TeacherConfig(checkpoint=str(teacher))
    means = evaluate_student(of, str(root / "data/valid"), against, LENGTH, SAMPLES)
    return {name: means[name] for name in ("lm_loss", "forward_kl", "top1_agreement")}


def distilled(student: StudentConfig, teacher: Path, root: Path, steps: int, seed: int, output: Path) -> Path:
    """Train a student as the quickstart does. Return its export."""
    from distill_nemo.training.entry import run_config

    config = load_yaml(root / "teacher/config.yaml")
    config = replace(config, output_dir=str(output), student=student, teacher=TeacherConfig(checkpoint=str(teacher)))
    config.training = replace(config.training, steps=steps, data_seed=seed, eval_interval=steps)
    run_config(config)
    return output / "student"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("root", type=Path, help="the quickstart's directory")
    parser.add_argument("--steps", type=int, default=0, help="of distillation; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the random choice and the data's order")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS / "pruning.json")
    arguments = parser.parse_args()
    setup_device()
    from distill_nemo.models.resolve import resolve

    root, teacher = arguments.root.absolute(), (arguments.root / "teacher/student").absolute()
    model, rows = resolve(StudentConfig(checkpoint=str(teacher))), []
    with tempfile.TemporaryDirectory() as temporary:
        with process_groups(ParallelismConfig()):
            activations = by_activations(model, str(root / "data/train"), Path(temporary, "cache"))
        ways = {"activations": activations, "magnitude": by_magnitude(model)}
        for seed in arguments.seeds:
            ways["random"] = at_random(activations, seed)
            for fraction in arguments.fractions:
                for way, scores in ways.items():
                    output = Path(temporary, f"{seed} {fraction} {way}")
                    with process_groups(ParallelismConfig()):
                        count = write(model, SIZES[fraction], scores, output)
                    row = {"fraction": fraction, "parameters": count, "by": way, "seed": seed, "steps": 0}
                    rows.append(row | measured(output, teacher, root))
                    print(json.dumps(rows[-1]), flush=True)
                    if arguments.steps:
                        of = StudentConfig(checkpoint=str(output))
                        rows.append(row | {"steps": arguments.steps} | _after(of, teacher, root, arguments, seed))
                        print(json.dumps(rows[-1]), flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def _after(student: StudentConfig, teacher: Path, root: Path, arguments: Any, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as output:
        exported = distilled(student, teacher, root, arguments.steps, seed, Path(output, "run"))
        return measured(exported, teacher, root)


if __name__ == "__main__":
    main()

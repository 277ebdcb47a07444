"""Write recipes/planned.json: the planner's layouts and figures for recipes/pairs.py and cuts.py. `make recipes`.

The models' sizes are those of tests/real_models.json.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run

from distill_nemo.config import ParallelismConfig, RunConfig
from distill_nemo.planning.gpus import GPUS, NODE, UTILISATION
from distill_nemo.pruning.stages import CompressConfig, fewest_nodes
from tests.unit.models.test_real_models import REAL, write
from tests.unit.planning.test_layouts import chosen, planned_pair

Plan = tuple[Any, float, float]  # a run at its layout, GB on the fullest GPU, GPU-hours
KINDS = ("h100", "h200", "b200")  # the first one's layout is the recipe's
FILE = Path(__file__).parents[1] / "recipes" / "planned.json"


def real_names(pair: Any) -> tuple[str, str]:
    """Return the names of teacher and student in tests/real_models.json."""
    teacher, student = (name if name in REAL else f"{name}, text" for name in (pair.teacher, pair.student))
    return teacher, student


def planned_recipe(row: Any, config: Any, directory: Path) -> dict[str, Any]:
    """Return the entry of a row of pairs.py or cuts.py: parameters, the layout for H100s, and a line for every GPU.

    Args:
        row: of the recipe.
        config: of the recipe.
        directory: to write the models' config.json in.
    """
    from distill_nemo.planning.parameters import total_parameters
    from distill_nemo.planning.report import layout_text

    plans = cut_plans if isinstance(config, CompressConfig) else pair_plans
    runs, lines = [], []
    for kind, (best, gigabytes, gpu_hours) in zip(KINDS, plans(row, config, directory), strict=True):
        training, layout = best.config.training, layout_text(best.config.parallelism, best.data_parallel_size)
        batch = f"micro batch {training.micro_batch_size}"
        batch += "" if training.recompute is None else f", recompute {training.recompute}"
        cost = f"{gigabytes:.1f} GB a GPU, {gpu_hours:,.0f} GPU-hours"
        lines.append(f"{row.gpus} x {GPUS[kind].name}: {layout}; {batch}; {cost}")
        runs.append(best)
    default, first = asdict(ParallelismConfig()), runs[0].config
    sizes = {name: size for name, size in asdict(first.parallelism).items() if size != default[name]}
    batch = {"micro_batch_size": first.training.micro_batch_size, "recompute": first.training.recompute}
    parameters = [total_parameters(model) for model in (runs[0].models.teacher, runs[0].models.student)]
    return {"parameters": parameters, "parallelism": sizes, "training": batch, "gpus": lines}


def pair_plans(pair: Any, config: RunConfig, directory: Path) -> Iterator[Plan]:
    """Yield the plans of a pair's run."""
    from distill_nemo.planning.compute import time_of
    from distill_nemo.planning.memory import fullest

    fields = {"training__steps": config.training.steps, "optimizer__warmup_steps": config.optimizer.warmup_steps}
    run = planned_pair(directory, real_names(pair), pair.gpus, **fields)
    for kind in KINDS:
        choice = chosen(run, kind)
        assert not isinstance(choice, str), f"{pair}: {choice}"
        time = time_of(choice.planned, GPUS[kind].bf16_tflops, UTILISATION)
        hours = (time.training + time.evaluations) / 3600
        yield choice.planned, fullest(choice.planned).total / 1e9, hours * pair.gpus


def cut_plans(cut: Any, config: CompressConfig, directory: Path) -> Iterator[Plan]:
    """Yield the plans of a compression: the memory of the stage that needs the most, the GPU-hours of all."""
    from distill_nemo.cli.compress import foreseen, with_layout

    config = replace(config, teacher=write(directory, REAL[cut.teacher]["config"]))
    config.data.train = ["any"]
    for kind in KINDS:
        with contextlib.redirect_stdout(None):
            laid_out = with_layout(config, cut.gpus, kind, [])
        rounds = foreseen(laid_out, has_data=False)
        from distill_nemo.planning.plan import planned_run
        from distill_nemo.pruning.plan import plan_stages

        few = fewest_nodes(laid_out.parallelism, cut.gpus // NODE, NODE) * NODE
        stages = plan_stages(rounds, few, cut.gpus, GPUS[kind], UTILISATION)
        most = max(each.num_bytes for each in stages) / 1e9
        assert most <= GPUS[kind].memory_gb
        yield planned_run(rounds[0].run, cut.gpus), most, sum(each.gpu_hours for each in stages)


def rows() -> dict[str, tuple[Any, run.Partial]]:
    """Return the rows by the names of their recipes, and the recipes as they are without a layout."""
    from recipes.base import of_checkpoints, pruned
    from recipes.cuts import CUTS
    from recipes.pairs import PAIRS

    of_pairs = {name: (pair, of_checkpoints(name, None, None)) for name, pair in PAIRS.items()}
    return of_pairs | {name: (cut, pruned(name, cut.teacher, **cut.sizes)) for name, cut in CUTS.items()}


def config_of(recipe: run.Partial) -> Any:
    """Return the config of a recipe of `distill` or `compress`."""
    from distill_nemo.cli.compress import compress

    return (CompressConfig if recipe.__fn_or_cls__ is compress else RunConfig)(**fdl.build(recipe).keywords)


def main() -> None:
    """Write the file."""
    entries = []
    for name, (row, recipe) in rows().items():
        with tempfile.TemporaryDirectory() as directory:
            entry = planned_recipe(row, config_of(recipe), Path(directory))
        entries.append(f"{json.dumps(name)}: {json.dumps(entry, indent=1)}")
    FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write recipes/planned.json: the planner's layouts and figures for the pairs of recipes/pairs.py. `make recipes`.

The models' sizes are those of tests/real_models.json.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill_nemo.config import ParallelismConfig
from distill_nemo.planning.gpus import GPUS, UTILISATION
from tests.unit.models.test_real_models import REAL
from tests.unit.planning.test_layouts import chosen, planned_pair

KINDS = ("h100", "h200", "b200")  # the first one's layout is the recipe's
FILE = Path(__file__).parents[1] / "recipes" / "planned.json"


def real_names(pair: Any) -> tuple[str, str]:
    """Return the names of teacher and student in tests/real_models.json."""
    teacher, student = (name if name in REAL else f"{name}, text" for name in (pair.teacher, pair.student))
    return teacher, student


def planned_recipe(pair: Any, recipe: Any, directory: Path) -> dict[str, Any]:
    """Return the entry of a pair: its models' parameters, the layout for H100s, and a line for every kind of GPU."""
    from distill_nemo.planning.compute import time_of
    from distill_nemo.planning.memory import fullest
    from distill_nemo.planning.parameters import total_parameters
    from distill_nemo.planning.report import layout_text

    training = recipe.training
    fields = {"training__steps": training.steps, "optimizer__warmup_steps": recipe.optimizer.warmup_steps}
    run, lines, layouts = planned_pair(directory, real_names(pair), pair.gpus, **fields), [], []
    for kind in KINDS:
        choice = chosen(run, kind)
        assert not isinstance(choice, str), f"{pair}: {choice}"
        best, gpu = choice.planned, GPUS[kind]
        time = time_of(best, gpu.bf16_tflops, UTILISATION)
        layout = layout_text(best.config.parallelism, best.data_parallel_size)
        batch = f"micro batch {best.config.training.micro_batch_size}"
        batch += "" if best.config.training.recompute is None else f", recompute {best.config.training.recompute}"
        hours = (time.training + time.evaluations) / 3600 * pair.gpus
        cost = f"{fullest(best).total / 1e9:.1f} GB a GPU, {hours:,.0f} GPU-hours"
        lines.append(f"{pair.gpus} x {gpu.name}: {layout}; {batch}; {cost}")
        layouts.append(best.config)
    default, first = asdict(ParallelismConfig()), layouts[0]
    sizes = {name: size for name, size in asdict(first.parallelism).items() if size != default[name]}
    batch = {"micro_batch_size": first.training.micro_batch_size, "recompute": first.training.recompute}
    parameters = [total_parameters(model) for model in (run.models.teacher, run.models.student)]
    return {"parameters": parameters, "parallelism": sizes, "training": batch, "gpus": lines}


def main() -> None:
    """Write the file."""
    from recipes.base import of_checkpoints
    from recipes.pairs import PAIRS

    rows = []
    for name, pair in PAIRS.items():
        with tempfile.TemporaryDirectory() as directory:
            entry = planned_recipe(pair, of_checkpoints(name, None, None), Path(directory))
        rows.append(f"{json.dumps(name)}: {json.dumps(entry, indent=1)}")
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

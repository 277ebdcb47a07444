"""Planned layout, memory and cost of the recipes for released models, and their docstrings.

planned.json holds the planner's result for each kind of GPU. `make recipes` writes it from the rows of pairs.py and
cuts.py, and a test compares it with the planner.
"""

import json
from pathlib import Path
from textwrap import fill
from typing import Any

import nemo_run as run

from distill_nemo.planning.gpus import NODE

PLANNED: dict[str, Any] = json.loads((Path(__file__).parent / "planned.json").read_text(encoding="utf-8"))


def directory(model: str) -> str:
    """Return the last part of a name on the Hugging Face Hub."""
    return model.rpartition("/")[2]


def with_layout(made: run.Partial, name: str) -> run.Partial:
    """Set the layout that a recipe is planned with on H100s."""
    for section in ("parallelism", "training"):
        for field, value in PLANNED[name][section].items():
            setattr(getattr(made, section), field, value)
    return made


def docstring(title: str, command: str, name: str, gpus: int, published: str, expect: str) -> str:
    """Return the docstring of a recipe.

    Args:
        title: first line, with a {} for the teacher's number of parameters, and one for the student's.
        command: command line without the executor.
        name: name of the recipe.
        gpus: number of GPUs that it is planned for.
        published: published results, with their source.
        expect: expected result of a run.
    """
    planned, nodes = PLANNED[name], gpus // NODE
    sizes = (f"{size / 1e9:.3g}B" if size >= 0.9995e9 else f"{size / 1e6:.0f}M" for size in planned["parameters"])
    slurm = f"run.executor=slurm run.executor.nodes={nodes} run.executor.devices={NODE} run.executor.time=24:00:00"
    parts = [
        title.format(*sizes),
        f"{command} \\\n    {slurm if nodes > 1 else f'run.executor=local run.executor.processes={gpus}'}",
        "Planned, for 2.6 billion tokens:\n" + "\n".join(f"    {line}" for line in planned["gpus"]),
        f"The recipe has the layout for H100s; for others add gpus={gpus} gpu=h200, and the planner chooses it.",
        f"Published: {published}.",
        f"Expected: {expect}.",
    ]
    return "\n\n".join(fill(part, 116) if "\n" not in part else part for part in parts)

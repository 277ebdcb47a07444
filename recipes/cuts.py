"""Recipes for students cut out of a released teacher: a row of data each, made into a function by `recipe_of`."""

from collections.abc import Callable
from dataclasses import dataclass

import nemo_run as run

from distill_nemo.cli.compress import compress
from recipes.base import pruned
from recipes.planned import PLANNED, directory, docstring, with_layout

MINITRON = "arXiv:2408.11796"
QWEN = "github.com/NVIDIA/Model-Optimizer, examples/pruning/minitron_vs_puzzletron"


@dataclass(frozen=True)
class Cut:
    """A student cut out of a released teacher.

    Args:
        teacher: its name on the Hugging Face Hub.
        sizes: fields of `CutConfig`.
        gpus: number of GPUs that the recipe is planned for.
        published: published results of this cut, with their source.
        expect: expected result of a run.
    """

    teacher: str
    sizes: dict[str, int]
    gpus: int
    published: str
    expect: str


CUTS = {
    "llama31_8b_to_4p5b": Cut(
        "meta-llama/Llama-3.1-8B",
        {"hidden_size": 3072, "ffn_hidden_size": 9216},
        gpus=8,
        published="NVIDIA's Llama-3.1-Minitron-4B-Width has these sizes; MMLU of the student 60.5, of the teacher "
        f"65.3, after 94 billion tokens and a correction of the teacher on the same data ({MINITRON})",
        expect="a student that the cut leaves far behind its teacher, and that comes closer with every token: add "
        "training.steps=180000 for NVIDIA's 94 billion",
    ),
    "mistral_nemo_12b_to_8b": Cut(
        "mistralai/Mistral-Nemo-Base-2407",
        {"hidden_size": 4096, "ffn_hidden_size": 11520},
        gpus=16,
        published="NVIDIA's Mistral-NeMo-Minitron-8B has these sizes; MMLU of the student 69.5, of the teacher 69.0, "
        f"after 380 billion tokens and a correction of the teacher on the same data ({MINITRON})",
        expect="a student between the cut one and its teacher; NVIDIA's run was 145 times as long",
    ),
    "qwen3_8b_to_6p6b": Cut(
        "Qwen/Qwen3-8B",
        {"num_layers": 28},
        gpus=8,
        published="MMLU of the teacher 74.9, of 28 of its 36 layers 50.8, after 1.9 billion tokens 73.9; GSM8K 87.5, "
        f"1.1 and 74.5; NVIDIA chose the layers by the same score ({QWEN})",
        expect="most of the knowledge back within some million tokens, and reasoning with more: conversations teach "
        "it better than web pages",
    ),
}


def recipe_of(name: str, cut: Cut) -> Callable[..., run.Partial]:
    """Return the recipe of a cut, at the layout for H100s, and register it with NeMo-Run."""

    def recipe(teacher: str = directory(cut.teacher)) -> run.Partial:
        return with_layout(pruned(name, teacher, **cut.sizes), name)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = docstring(
        f"{directory(cut.teacher)} ({{}} parameters) cut to {{}}.",
        f"nemo distill compress {name} teacher=/models/{directory(cut.teacher)} data.train='[\"corpus\"]'",
        name,
        cut.gpus,
        cut.published,
        cut.expect,
    )
    return run.cli.factory(target=compress)(recipe)


# A new row has no recipe until `make recipes` has planned it.
RECIPES = {name: recipe_of(name, cut) for name, cut in CUTS.items() if name in PLANNED}

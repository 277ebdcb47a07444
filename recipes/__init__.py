"""One function is one run: `from recipes import llama32_3b_to_1b`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import nemo_run as run

from distill_nemo.cli.commands import register_commands
from distill_nemo.cli.entrypoint import register
from distill_nemo.cli.launch import TrainContext
from recipes import cuts, pairs
from recipes.compress import minitron
from recipes.distil import distil
from recipes.quantized import qad_fp8, qad_int4, qad_int8, qad_nvfp4
from recipes.quickstart import quickstart, quickstart_alone, quickstart_teacher, run_quickstart

__all__ = [
    "distil",
    "minitron",
    "qad_fp8",
    "qad_int4",
    "qad_int8",
    "qad_nvfp4",
    "quickstart",
    "quickstart_alone",
    "quickstart_teacher",
]
RECIPES = pairs.RECIPES | cuts.RECIPES
globals().update(RECIPES)

if TYPE_CHECKING:  # for checkers, which cannot know the names in a table

    def __getattr__(name: str) -> Callable[..., run.Partial]:
        """Return a recipe for released models."""
        ...


# NeMo-Run finds the commands by importing this package, which is named as its entry point.
register(run_quickstart, name="quickstart", context=TrainContext, kind="experiment")
register_commands()

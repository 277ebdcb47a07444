"""One function is one run: `from recipes import llama32_3b_to_1b`."""

from distill_nemo.cli.commands import register_commands
from distill_nemo.cli.entrypoint import register
from distill_nemo.cli.launch import TrainContext
from recipes.distil import distil
from recipes.llama32 import llama32_3b_to_1b
from recipes.quickstart import quickstart, quickstart_alone, quickstart_teacher, run_quickstart
from recipes.qwen3 import qwen3_8b_to_1p7b

__all__ = [
    "distil",
    "llama32_3b_to_1b",
    "quickstart",
    "quickstart_alone",
    "quickstart_teacher",
    "qwen3_8b_to_1p7b",
]

# NeMo-Run finds the commands by importing this package, which is named as its entry point.
register_commands()
register(run_quickstart, name="quickstart", context=TrainContext, kind="experiment")

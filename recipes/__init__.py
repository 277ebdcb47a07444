"""One function is one run: `from recipes import llama32_3b_to_1b`."""

import distill_nemo.cli_plan  # noqa: F401  (registers the commands: NeMo-Run's entry point imports this package)
from recipes.llama32 import llama32_3b_to_1b
from recipes.quickstart import quickstart, quickstart_alone, quickstart_teacher
from recipes.qwen3 import qwen3_8b_to_1p7b

__all__ = ["llama32_3b_to_1b", "quickstart", "quickstart_alone", "quickstart_teacher", "qwen3_8b_to_1p7b"]

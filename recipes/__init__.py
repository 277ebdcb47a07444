"""One function is one run: `from recipes import llama32_3b_to_1b`."""

from distill_nemo.cli.commands import register_commands
from distill_nemo.cli.entrypoint import register
from distill_nemo.cli.launch import TrainContext
from recipes.compress import minitron
from recipes.distil import distil
from recipes.gemma2 import gemma2_27b_to_2b
from recipes.gpt_oss import gpt_oss_120b_to_20b
from recipes.llama32 import llama32_3b_to_1b
from recipes.mixtral import mixtral_8x7b_to_mistral_7b
from recipes.olmo2 import olmo2_32b_to_1b
from recipes.quickstart import quickstart, quickstart_alone, quickstart_teacher, run_quickstart
from recipes.qwen2 import qwen25_32b_to_7b
from recipes.qwen3 import qwen3_8b_to_1p7b, qwen3_30b_a3b_to_4b, qwen3_32b_to_4b

__all__ = [
    "distil",
    "gemma2_27b_to_2b",
    "gpt_oss_120b_to_20b",
    "llama32_3b_to_1b",
    "minitron",
    "mixtral_8x7b_to_mistral_7b",
    "olmo2_32b_to_1b",
    "quickstart",
    "quickstart_alone",
    "quickstart_teacher",
    "qwen3_8b_to_1p7b",
    "qwen3_30b_a3b_to_4b",
    "qwen3_32b_to_4b",
    "qwen25_32b_to_7b",
]

# NeMo-Run finds the commands by importing this package, which is named as its entry point.
register_commands()
register(run_quickstart, name="quickstart", context=TrainContext, kind="experiment")

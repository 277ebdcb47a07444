"""Recipes for pairs of released models that share a tokenizer: a row of data each, made into a function by `recipe_of`.

Of families without a recipe (DeepSeek-V3, GLM-4.7-Flash, OLMoE, SmolLM3, Seed-OSS, Ministral) we know no smaller
release with the tokenizer: prune one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import of_checkpoints
from recipes.planned import PLANNED, directory, docstring, with_layout

EXPECT = (
    "the KL to the teacher falls on text like the corpus; benchmarks move little, as the student has been trained on "
    "far more tokens than the run has"
)
MODEL_CARD = "github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD.md"
NANO = "github.com/NVIDIA/Model-Optimizer, examples/pruning/minitron/NVIDIA-Nemotron-Nano-9B-v2"


@dataclass(frozen=True)
class Pair:
    """Two released models with one tokenizer.

    Args:
        teacher: its name on the Hugging Face Hub.
        student: likewise.
        gpus: number of GPUs that the recipe is planned for.
        published: published results of this pair, with their source; empty if none are known.
        expect: expected result of a run.
    """

    teacher: str
    student: str
    gpus: int
    published: str = ""
    expect: str = ""


PAIRS = {
    "deepseek_r1_qwen_32b_to_1p5b": Pair(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        gpus=16,
        published="AIME 2024 pass@1 of the student 28.9, of the teacher 72.6; both were fine-tuned on R1's answers, "
        "without logits (arXiv:2501.12948, table 5)",
        expect="little from plain text; take conversations in R1's format, and a data.sequence_length for long answers",
    ),
    "gemma2_27b_to_2b": Pair(
        "google/gemma-2-27b",
        "google/gemma-2-2b",
        gpus=16,
        published="a 2B model distilled from a 7B on 500 billion tokens reaches 67.7 on three benchmarks, from scratch "
        "60.3 (arXiv:2408.00118, table 6)",
        expect="a small gain, as Google's 2B was itself distilled from a larger model",
    ),
    "gemma3_12b_to_1b": Pair(
        "google/gemma-3-12b-pt",
        "google/gemma-3-1b-pt",
        gpus=8,
        published="all Gemma 3 models were trained by distillation, from 256 sampled logits a token, and no figure "
        "without it was given (arXiv:2503.19786)",
        expect="a small gain, as Google's 1B was itself distilled; the teacher's last 64 ids are left out",
    ),
    "glm45_to_air": Pair("zai-org/GLM-4.5", "zai-org/GLM-4.5-Air", gpus=128),
    "gpt_oss_120b_to_20b": Pair("openai/gpt-oss-120b", "openai/gpt-oss-20b", gpus=64),
    "granite31_8b_to_2b": Pair("ibm-granite/granite-3.1-8b-instruct", "ibm-granite/granite-3.1-2b-instruct", gpus=8),
    "granite31_8b_to_1b_a400m": Pair(
        "ibm-granite/granite-3.1-8b-instruct", "ibm-granite/granite-3.1-1b-a400m-instruct", gpus=8
    ),
    "granite4_micro_to_350m": Pair("ibm-granite/granite-4.0-micro", "ibm-granite/granite-4.0-350m", gpus=8),
    "llama32_3b_to_1b": Pair(
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Llama-3.2-1B",
        gpus=8,
        published="MMLU (5-shot) of the student 32.2, of the teacher 58.0; Meta pruned and distilled both, from "
        f"Llama 3.1 8B and 70B ({MODEL_CARD})",
        expect="a small gain, as the student has learnt from larger teachers on up to 9 trillion tokens",
    ),
    "mixtral_8x7b_to_mistral_7b": Pair("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mistral-7B-v0.1", gpus=16),
    "nemotron_nano_12b_to_9b": Pair(
        "nvidia/NVIDIA-Nemotron-Nano-12B-v2",
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        gpus=16,
        published="MMLU of the student 74.7, of the teacher 78.5; AIME 2025 73.7 and 74.4; NVIDIA cut the student out "
        f"of this teacher (arXiv:2508.14444; figures: {NANO})",
        expect="a small gain, as the student was distilled from this teacher",
    ),
    "olmo2_32b_to_1b": Pair("allenai/OLMo-2-0325-32B", "allenai/OLMo-2-0425-1B", gpus=16),
    "olmo3_32b_to_7b": Pair("allenai/Olmo-3-1125-32B", "allenai/Olmo-3-1025-7B", gpus=16),
    "phi3_medium_to_mini": Pair("microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", gpus=8),
    "qwen2_57b_a14b_to_1p5b": Pair("Qwen/Qwen2-57B-A14B", "Qwen/Qwen2-1.5B", gpus=16),
    "qwen25_32b_to_7b": Pair("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-7B", gpus=16),
    "qwen3_8b_to_1p7b": Pair("Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B", gpus=8),
    "qwen3_32b_to_4b": Pair("Qwen/Qwen3-32B", "Qwen/Qwen3-4B", gpus=16),
    "qwen3_32b_to_8b": Pair(
        "Qwen/Qwen3-32B",
        "Qwen/Qwen3-8B",
        gpus=16,
        published="AIME 2024 of an 8B after distillation on a teacher's answers 55.0, after 1,800 GPU-hours more of "
        "distillation on its own answers 74.4 (arXiv:2505.09388, table 21)",
        expect="a small gain from the teacher's answers; on-policy distillation is not supported",
    ),
    "qwen3_30b_a3b_to_4b": Pair("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-4B", gpus=16),
    "qwen3_235b_a22b_to_30b_a3b": Pair("Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B", gpus=64),
    "qwen3_next_80b_a3b_to_8b": Pair("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-8B", gpus=32),
    "qwen35_27b_to_9b": Pair("Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-9B", gpus=16),
    "qwen35_35b_a3b_to_0p8b": Pair("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-0.8B", gpus=16),
    "smollm2_1p7b_to_135m": Pair("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M", gpus=8),
}


def recipe_of(name: str, pair: Pair) -> Callable[..., run.Partial]:
    """Return the recipe of a pair, at the layout for H100s, and register it with NeMo-Run."""
    large, small = directory(pair.teacher), directory(pair.student)

    def recipe(teacher: str = large, student: str = small) -> run.Partial:
        return with_layout(of_checkpoints(name, teacher, student), name)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = docstring(
        f"{large} ({{}} parameters) into {small} ({{}}).",
        f"nemo distill train {name} data.train='[\"corpus\"]' \\\n"
        f"    teacher.checkpoint=/models/{large} student.checkpoint=/models/{small}",
        name,
        pair.gpus,
        pair.published or "nothing known for this pair",
        pair.expect or EXPECT,
    )
    return run.cli.factory(target=distill)(recipe)


# A new row has no recipe until `make recipes` has planned it.
RECIPES = {name: recipe_of(name, pair) for name, pair in PAIRS.items() if name in PLANNED}

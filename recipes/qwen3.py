"""Qwen3, dense."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def qwen3_8b_to_1p7b(teacher: str = "Qwen3-8B", student: str = "Qwen3-1.7B") -> run.Partial:
    """Qwen3 8B into 1.7B, tensor parallel 4. Both are local Hugging Face directories.

    nemo distill train --factory qwen3_8b_to_1p7b data.train='["corpus"]' run.executor=local run.executor.processes=8
    """
    return pair("qwen3_8b_to_1p7b", teacher, student, tensor_model_parallel_size=4)


@run.cli.factory(target=distill)
def qwen3_32b_to_4b(teacher: str = "Qwen3-32B", student: str = "Qwen3-4B") -> run.Partial:
    r"""Qwen3 32B into 4B.

    nemo distill train qwen3_32b_to_4b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 66.6 GB each; GPU-hours: H100 191, H200 191, B200 84.
    No published figure is known for this pair.
    """
    recipe = pair("qwen3_32b_to_4b", teacher, student, tensor_model_parallel_size=2)
    recipe.training.micro_batch_size = 2
    return recipe


@run.cli.factory(target=distill)
def qwen3_30b_a3b_to_4b(teacher: str = "Qwen3-30B-A3B", student: str = "Qwen3-4B") -> run.Partial:
    r"""Qwen3 30B-A3B, a mixture of experts, into the dense 4B.

    nemo distill train qwen3_30b_a3b_to_4b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 71.3 GB each; GPU-hours: H100 68, H200 68, B200 30.
    No published figure is known for this pair.
    """
    recipe = pair("qwen3_30b_a3b_to_4b", teacher, student, expert_model_parallel_size=8)
    recipe.training.micro_batch_size = 2
    return recipe

"""Qwen2.5."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def qwen25_32b_to_7b(teacher: str = "Qwen2.5-32B-Instruct", student: str = "Qwen2.5-7B") -> run.Partial:
    r"""Qwen2.5 32B into 7B.

    nemo distill train qwen25_32b_to_7b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 72.5 GB each; GPU-hours: H100 221, H200 221, B200 97.
    No published figure is known for this pair.
    """
    recipe = pair("qwen25_32b_to_7b", teacher, student, tensor_model_parallel_size=2)
    recipe.training.micro_batch_size = 1
    return recipe

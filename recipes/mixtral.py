"""Mixtral."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def mixtral_8x7b_to_mistral_7b(teacher: str = "Mixtral-8x7B-v0.1", student: str = "Mistral-7B-v0.1") -> run.Partial:
    r"""Mixtral 8x7B, a mixture of experts, into Mistral 7B, both of version 0.1.

    nemo distill train mixtral_8x7b_to_mistral_7b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 60.0 GB each; GPU-hours: H100 141, H200 141, B200 62.
    No published figure is known for this pair.
    """
    recipe = pair(
        "mixtral_8x7b_to_mistral_7b", teacher, student, tensor_model_parallel_size=2, expert_model_parallel_size=4
    )
    recipe.training.micro_batch_size = 2
    return recipe

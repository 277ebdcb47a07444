"""Gemma 2."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def gemma2_27b_to_2b(teacher: str = "gemma-2-27b", student: str = "gemma-2-2b") -> run.Partial:
    r"""Gemma 2 27B into 2B.

    nemo distill train gemma2_27b_to_2b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 69.9 GB each; GPU-hours: H100 146, H200 146, B200 64.
    Google's 2B was itself distilled from a larger model (arXiv:2408.00118), so expect a small gain.
    """
    recipe = pair("gemma2_27b_to_2b", teacher, student, tensor_model_parallel_size=2)
    recipe.training.micro_batch_size = 4
    return recipe

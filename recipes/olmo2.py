"""OLMo 2."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def olmo2_32b_to_1b(teacher: str = "OLMo-2-0325-32B", student: str = "OLMo-2-0425-1B") -> run.Partial:
    r"""OLMo 2 32B into 1B.

    nemo distill train olmo2_32b_to_1b data.train='["corpus"]' run.executor=slurm run.executor.nodes=2 \\
        run.executor.devices=8

    Planned for 16 GPUs: 64.8 GB each; GPU-hours: H100 150, H200 150, B200 66.
    No published figure is known for this pair.
    """
    recipe = pair("olmo2_32b_to_1b", teacher, student, tensor_model_parallel_size=2)
    recipe.training.micro_batch_size = 8
    return recipe

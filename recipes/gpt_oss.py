"""gpt-oss."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def gpt_oss_120b_to_20b(teacher: str = "gpt-oss-120b", student: str = "gpt-oss-20b") -> run.Partial:
    r"""gpt-oss 120B into 20B, both mixtures of experts.

    nemo distill train gpt_oss_120b_to_20b data.train='["corpus"]' run.executor=slurm run.executor.nodes=8 \\
        run.executor.devices=8

    Planned for 64 GPUs: 66.0 GB each; GPU-hours: H100 78, H200 78, B200 34.
    No published figure is known for this pair.
    """
    recipe = pair("gpt_oss_120b_to_20b", teacher, student, expert_model_parallel_size=8)
    recipe.training.micro_batch_size = 2
    recipe.training.recompute = "full"
    return recipe

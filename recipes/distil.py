"""Any two checkpoints that share a vocabulary."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import of_checkpoints


@run.cli.factory(target=distill)
def distil(teacher: str | None = None, student: str | None = None) -> run.Partial:
    """Any two checkpoints that share a vocabulary. With `gpus=` the planner chooses the layout.

    nemo distill train distil teacher.checkpoint=A student.checkpoint=B data.train='["corpus"]' gpus=8 gpu=h100
    """
    return of_checkpoints("distil", teacher, student)

"""Llama 3.2."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import pair


@run.cli.factory(target=distill)
def llama32_3b_to_1b(teacher: str = "Llama-3.2-3B", student: str = "Llama-3.2-1B") -> run.Partial:
    """Llama 3.2 3B into 1B, tensor parallel 2. Both are local Hugging Face directories.

    nemo distill train --factory llama32_3b_to_1b data.train='["corpus"]' run.executor=local run.executor.processes=8
    """
    return pair("llama32_3b_to_1b", teacher, student, tensor_model_parallel_size=2)

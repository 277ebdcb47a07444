"""A student pruned from its teacher."""

import nemo_run as run

from distill_nemo.cli.compress import compress
from recipes.base import pruned


@run.cli.factory(target=compress)
def minitron(teacher: str | None = None) -> run.Partial:
    r"""Any teacher pruned to any size and distilled, with the settings of the Minitron papers.

    nemo distill compress teacher=/models/Qwen3-8B output=runs/q6b target_params=6e9 data.train='["corpus"]' gpus=8
    """
    return pruned("minitron", teacher)

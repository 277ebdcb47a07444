"""A recipe is a value: take one, change what your run does differently, launch it.

Run `make quickstart` first; this distils its student once more, from the same teacher and tokens, at temperature 2.
"""

import nemo_run as run

from distill_nemo.executors import local
from recipes import quickstart

if __name__ == "__main__":
    recipe = quickstart(steps=20)
    recipe.distillation.temperature = 2.0
    recipe.output_dir = "runs/temperature_2"
    run.run(recipe, executor=local(processes=2), name="temperature_2")
    print("student: runs/temperature_2/student")

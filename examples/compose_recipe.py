"""Launch a changed recipe: a recipe is a Python object whose fields can be set.

Run `make quickstart` first. This distils its student again, from the same teacher and tokens, at temperature 2.
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

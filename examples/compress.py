"""Cut a student out of a teacher and distil it: prune, distil, evaluate, report, in one experiment.

The teacher is the quickstart's, smaller and trained for a moment here. Takes about a minute and a half and no GPU.
"""

from pathlib import Path

import nemo_run as run

from distill_nemo.cli.compress import Place, launch
from distill_nemo.data.stdlib_corpus import write_stdlib_corpus
from distill_nemo.executors import local
from recipes import minitron, quickstart_teacher

ROOT = "runs/compress"

if __name__ == "__main__":
    write_stdlib_corpus(f"{ROOT}/data", vocab_size=2048)
    teacher = quickstart_teacher(20, ROOT)
    teacher.student.num_layers = 2
    teacher.training.eval_interval, teacher.training.eval_batches = 10, 2
    run.run(teacher, executor=local(), name="teacher")

    recipe = minitron(teacher=f"{ROOT}/teacher/student")
    recipe.output = f"{ROOT}/student"
    recipe.ffn_hidden_size, recipe.num_query_groups = 512, 2
    recipe.samples, recipe.held_out_samples = 64, 16
    recipe.data = teacher.data
    recipe.training = teacher.training
    recipe.optimizer.warmup_steps = 4
    launch(recipe, Place(lambda nodes, devices: local(devices)))
    assert Path(ROOT, "student/student/model.safetensors").is_file()

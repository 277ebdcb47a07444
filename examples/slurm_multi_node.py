"""Launch on eight nodes of eight GPUs on SLURM. It prints the batch script, offline; `--submit` submits it.

Set your account, partition, paths and set-up lines; docs/launching.md explains each.
"""

import sys

import nemo_run as run

from distill_nemo.executors import WatchedExperiment, check_launch, run_config_of, slurm
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    recipe = llama32_3b_to_1b(teacher="/lustre/models/Llama-3.2-3B", student="/lustre/models/Llama-3.2-1B")
    recipe.data.train = ["/lustre/data/corpus"]
    recipe.training.micro_batch_size = 2  # of the 128 samples of a step; the recipe is planned for 8 GPUs
    recipe.output_dir = "/lustre/runs/llama32_3b_to_1b"
    executor = slurm(
        account="nlp",
        partition="batch",
        nodes=8,
        devices=8,
        exclusive=True,
        time="04:00:00",
        stop_seconds=600,  # ten minutes to finish the step and save
        retries=10,  # times that SLURM queues the job again; it resumes
        container_image="nvcr.io#nvidia/pytorch:26.03-py3",
        container_mounts=["/lustre:/lustre"],
        env={"NCCL_DEBUG": "WARN"},
        setup=["ulimit -n 65536"],
    )
    submit = "--submit" in sys.argv
    check_launch(run_config_of(recipe), executor, dryrun=not submit)
    if submit:
        run.run(recipe, executor=executor, name="llama32_3b_to_1b", detach=True)
    else:
        with WatchedExperiment.titled("llama32_3b_to_1b") as experiment:
            experiment.add(recipe, executor=executor, name="llama32_3b_to_1b")
            experiment.show()

"""Launch on two nodes of eight GPUs on Kubernetes. It prints the objects, offline; `--submit` creates them.

Set your image, volume, secrets and version of Trainer; docs/launching.md explains each.
"""

import sys

import nemo_run as run

from distill_nemo.executors import WatchedExperiment, check_launch, kubernetes, run_config_of
from recipes import llama32_3b_to_1b

if __name__ == "__main__":
    recipe = llama32_3b_to_1b(teacher="/workspace/models/Llama-3.2-3B", student="/workspace/models/Llama-3.2-1B")
    recipe.data.train = ["/workspace/data/corpus"]
    recipe.output_dir = "/workspace/runs/llama32_3b_to_1b"
    executor = kubernetes(
        image="registry.example/distill-nemo:0.1",
        namespace="research",
        nodes=2,
        devices=8,
        cpus=64,
        memory="800Gi",
        shared_memory="64Gi",
        pvc="work",  # mounted at /workspace
        secrets={"HF_TOKEN": "hub/token"},  # the key `token` of the Secret `hub`
        tolerations=["nvidia.com/gpu:NoSchedule"],
        time="1-0",
        stop_seconds=600,  # ten minutes to finish the step and save
        env={"NCCL_DEBUG": "WARN"},
        labels={"kueue.x-k8s.io/queue-name": "research"},
        trainer_version="2.3",
    )
    submit = "--submit" in sys.argv
    check_launch(run_config_of(recipe), executor, dryrun=not submit)
    if submit:
        run.run(recipe, executor=executor, name="llama32_3b_to_1b", detach=True)
    else:
        with WatchedExperiment.titled("llama32_3b_to_1b") as experiment:
            experiment.add(recipe, executor=executor, name="llama32_3b_to_1b")
            experiment.show()

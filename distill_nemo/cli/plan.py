"""`nemo distill plan`: takes the arguments of `train` and prints what the run would need."""

from collections.abc import Callable
from typing import Any

import nemo_run as run

from distill_nemo.cli.arguments import parse_arguments
from distill_nemo.cli.entrypoint import Command
from distill_nemo.cli.help import PLAN, command_help
from distill_nemo.cli.launch import TrainContext
from distill_nemo.config import RunConfig
from distill_nemo.executors import run_config_of
from distill_nemo.executors.preflight import check_fits_nodes
from distill_nemo.planning.gpus import UTILISATION, find_gpu
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.training.entry import distill

ANY_DATA = ["any"]  # a plan reads no tokens, and can be made before there are any


class PlanContext(TrainContext):
    """Context of `train` that hands the resolved recipe and executor to `plan`."""

    planned: tuple[str, RunConfig, int]  # recipe, its config, ranks

    def _execute_experiment(self, fn: Callable[..., Any], experiment_args: list[str]) -> None:
        experiment_args = self.without_recipe(experiment_args)
        of_recipe = [argument for argument in experiment_args if _is_of_recipe(argument.partition("=")[0])]
        own = parse_arguments(fn, [argument for argument in experiment_args if argument not in of_recipe], "plan")
        if own.get("gpus") is not None:
            of_recipe += [f"{name}={own[name]}" for name in ("gpus", "gpu") if name in own]
        config = run_config_of(self.parse_fn(distill, of_recipe))
        config.data.train = config.data.train or ANY_DATA
        executor = self.built_executor()
        check_fits_nodes(config, executor)
        self.planned = str(self.factory), config, executor.nnodes() * executor.nproc_per_node()
        fn(self, **own)


def _is_of_recipe(name: str) -> bool:
    return "." in name or name in distill.__annotations__


class PlanCommand(Command):
    """`plan`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return command_help(self.name, self.fn, PLAN, " RECIPE")


def plan(
    ctx: run.cli.RunContext,
    gpus: int | None = None,
    gpu: str = "h100",
    utilisation: float = UTILISATION,
    transformer_engine: bool = True,
) -> None:
    r"""Print what a run would need and whether it fits: parameters, memory by part, operations, hours.

    Everything is computed from the config and the checkpoints' config.json, without GPU, weights or data.

    Example:
        nemo distill plan llama32_3b_to_1b training.micro_batch_size=2 gpu=h200 \
            run.executor=slurm run.executor.nodes=2 run.executor.devices=8
        nemo distill plan distil teacher.checkpoint=/models/Qwen3-32B student.checkpoint=/models/Qwen3-8B gpus=16

    Args:
        ctx: NeMo-Run's context.
        gpus: choose the fastest layout of this many GPUs that fits, as in `train`; the executor need not be named.
        gpu: a100-80gb, h100, h200 or b200; one per rank.
        utilisation: share of the GPU's peak that a step is assumed to reach.
        transformer_engine: use Transformer Engine's layers; false means Megatron's own, without its fused kernels.
    """
    found = find_gpu(gpu)
    with megatron_imports():
        from distill_nemo.planning.plan import print_plan

    assert isinstance(ctx, PlanContext), "register_commands passes it"
    print_plan(*ctx.planned, found, utilisation, transformer_engine)

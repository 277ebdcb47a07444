"""Choice of a recipe's parallel layout: `gpus=16 gpu=h100`."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import fiddle as fdl
import nemo_run as run

from distill_nemo.cli.values import parse
from distill_nemo.executors import local, num_gpus, run_config_of
from distill_nemo.fields import require
from distill_nemo.planning.gpus import NODE, find_gpu
from distill_nemo.runtime.imports import megatron_imports

SECTIONS = ("parallelism", "training")


@dataclass
class LayoutArguments:
    """GPUs to choose a layout for; None: keep the recipe's layout."""

    gpus: int | None = None
    gpu: str = "h100"


def split_layout_arguments(arguments: Iterable[str]) -> tuple[LayoutArguments, list[str]]:
    """Return `gpus=` and `gpu=`, and the other arguments.

    Raises:
        ValueError: for a number that is none, and a GPU without a number.
    """
    given, others = LayoutArguments(), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "gpus":
            given.gpus = gpus = parse("gpus", value, int)
            require(gpus >= 1, f"gpus must be at least 1, got {gpus}")
        elif name == "gpu":
            given.gpu = parse("gpu", value, str)
        else:
            others.append(argument)
    require(
        given.gpus is not None or given.gpu == LayoutArguments.gpu,
        f"gpu = {given.gpu} chooses a layout, and needs gpus=, the number of GPUs: add that, or leave gpu= out",
    )
    return given, others


def choose_layout(recipe: fdl.Buildable, gpus: int, gpu: str = "h100", fixed: Collection[str] = ()) -> None:
    """Set a recipe's parallel sizes, micro batch size and recomputation to the fastest that fit, and say which and why.

    Args:
        recipe: of a run; both checkpoints' config.json are read.
        gpus: number of GPUs.
        gpu: a100-80gb, h100, h200 or b200.
        fixed: fields such as `training.recompute` that keep their values.

    Raises:
        ValueError: if nothing fits, with the least number of GPUs that would do.
    """
    found = find_gpu(gpu)
    with megatron_imports():
        from distill_nemo.planning.layouts import CHOSEN
        from distill_nemo.planning.plan import with_layout

    config = run_config_of(recipe)
    config.data.train = config.data.train or ["any"]  # on which no layout depends
    names = [name.partition(".")[2] for name in fixed if name.partition(".")[0] in SECTIONS]
    chosen, why = with_layout(config, gpus, found, [name for name in names if name in CHOSEN])
    for section in SECTIONS:
        values = vars(getattr(chosen, section))
        for name in CHOSEN & values.keys():
            setattr(getattr(recipe, section), name, values[name])
    print(f"layout for {gpus} x {found.name}: {why}")


def executor_of(gpus: int, executor: run.Executor | None) -> run.Executor:
    """Return the executor, by default this machine with a rank for each GPU.

    Raises:
        ValueError: if it has another number of ranks.
    """
    if executor is None:
        return local(gpus)
    ranks = executor.nnodes() * executor.nproc_per_node()
    require(ranks == gpus, f"gpus = {gpus}, but run.executor.* starts {ranks} ranks; one GPU for each rank")
    return executor


def check_one_node(ranks: int) -> None:
    """Refuse more ranks than this machine has GPUs, where no executor is named. Without GPUs, ranks share its cores."""
    most = num_gpus() or NODE
    require(
        ranks <= most,
        f"gpus = {ranks}, and this machine has {most}: name an executor, such as run.executor=slurm "
        f"run.executor.nodes={-(-ranks // NODE)} run.executor.devices={NODE}",
    )

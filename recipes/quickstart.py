"""The quickstart: a small teacher and two students, one of them distilled, on the text of Python's standard library.

It needs no GPU, weights or network. Cost: 5 to 11 minutes on 2 CPU cores, after the installation.
"""

import json
import sys
from pathlib import Path

import nemo_run as run

from distill_nemo.checks import check
from distill_nemo.config_files import load_yaml
from distill_nemo.data.stdlib_corpus import write_stdlib_corpus
from distill_nemo.executors import WatchedExperiment, local, num_gpus, run_config_of
from distill_nemo.fields import require
from distill_nemo.reports.quickstart import compare_quickstart
from distill_nemo.training.entry import distill
from recipes.base import base

ROOT = "runs/quickstart"
VOCAB_SIZE = 2048


def _small(name: str, root: str, layers: int, width: int, steps: int, lr: float, seed: int) -> run.Partial:
    recipe = base(name)
    recipe.output_dir = f"{root}/{name}"
    model = recipe.student
    model.family = "llama"
    model.num_layers = layers
    model.hidden_size = width
    model.ffn_hidden_size = width * 3
    model.num_attention_heads = width // 32
    model.num_query_groups = width // 64
    model.vocab_size = VOCAB_SIZE
    model.max_position_embeddings = 512
    recipe.data.train = [f"{root}/data/train"]
    recipe.data.valid = [f"{root}/data/valid"]
    recipe.data.tokenizer = f"{root}/data/tokenizer"
    recipe.data.sequence_length = 128
    recipe.training.steps = steps
    recipe.training.seed = seed
    recipe.training.data_seed = 1
    recipe.training.micro_batch_size = 8
    recipe.training.global_batch_size = 16
    recipe.training.eval_interval = max(steps // 8, 1)
    recipe.training.eval_batches = 8
    recipe.optimizer.lr = lr
    recipe.optimizer.min_lr = lr / 10
    recipe.optimizer.warmup_steps = min(20, steps // 2)
    recipe.checkpoint.save_interval = 50
    recipe.logging.log_interval = max(steps // 10, 1)
    return recipe


@run.cli.factory(target=distill)
def quickstart_teacher(steps: int = 240, root: str = ROOT, seed: int = 0) -> run.Partial:
    """The quickstart's teacher: 4 layers x 256, trained on the corpus alone."""
    recipe = _small("teacher", root, layers=4, width=256, steps=steps, lr=1e-3, seed=seed)
    recipe.teacher = None
    return recipe


@run.cli.factory(target=distill)
def quickstart(steps: int = 160, root: str = ROOT, seed: int = 0) -> run.Partial:
    """The quickstart's student: 2 layers x 128, distilled by forward KL from the teacher's Hugging Face directory."""
    recipe = _small("distilled", root, layers=2, width=128, steps=steps, lr=2e-3, seed=seed)
    recipe.teacher.checkpoint = f"{root}/teacher/student"
    return recipe


@run.cli.factory(target=distill)
def quickstart_alone(steps: int = 160, root: str = ROOT, seed: int = 0) -> run.Partial:
    """The same student, initial weights and tokens, without a teacher."""
    recipe = _small("alone", root, layers=2, width=128, steps=steps, lr=2e-3, seed=seed)
    recipe.teacher = None
    return recipe


def run_quickstart(
    ctx: run.cli.RunContext,
    steps: int = 160,
    teacher_steps: int = 240,
    root: str = ROOT,
    processes: int = 0,
    seed: int = 0,
) -> None:
    """Train a teacher, distil a student, train one alone, and compare them: ten minutes on two cores, no GPU.

    The same command resumes where it was interrupted.

    Example:
        nemo distill quickstart

    Args:
        ctx: NeMo-Run's context.
        steps: steps of both students.
        teacher_steps: steps of the teacher.
        root: directory for everything that it writes.
        processes: data-parallel ranks; 0 means two, or one if there is one GPU.
        seed: seed of the initial weights.
    """
    many = local(processes or (1 if num_gpus() == 1 else 2))
    single = run.LocalExecutor(env_vars=many.env_vars)
    stages = (
        ("corpus", run.Partial(write_stdlib_corpus, output=f"{root}/data", vocab_size=VOCAB_SIZE), single),
        ("teacher", quickstart_teacher(teacher_steps, root, seed), many),
        ("distilled", quickstart(steps, root, seed), many),
        ("alone", quickstart_alone(steps, root, seed), many),
        ("report", run.Partial(compare_quickstart, root=root), single),
    )
    for _, task, executor in stages:
        if task.__fn_or_cls__ is distill:
            check(run_config_of(task), executor.nproc_per_node())
        if ctx.dryrun:
            run.dryrun_fn(task, executor=executor)
    if ctx.dryrun:
        return
    _check_teacher(root, teacher_steps)
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"root = {root} cannot be made: {error.strerror}; choose another directory") from None
    with WatchedExperiment.titled("quickstart") as experiment:
        for name, task, executor in stages:
            experiment.add(task, executor=executor, name=name, tail_logs=True)
        ctx.launch(experiment, sequential=True)
    _conclude(Path(root))


def _check_teacher(root: str, steps: int) -> None:
    """Refuse to train the teacher further once the student learns from it, which would fit another one then."""
    config = Path(root, "teacher", "config.yaml")
    if config.is_file() and Path(root, "distilled").exists():
        before = load_yaml(config).training.steps
        require(
            steps == before,
            f"teacher_steps = {steps}: the student in {root} learns from a teacher of {before} steps; set "
            "teacher_steps to that, or root to another directory",
        )


def _conclude(root: Path) -> None:
    """Print the table, the places of all results, and the next commands."""
    from rich.console import Console

    from distill_nemo.reports.comparison import render_table

    nemo = Path(sys.executable).parent / "nemo"
    Console().print(render_table(json.loads((root / "comparison.json").read_text())))
    print(f"student  {root}/student (Hugging Face)\nreport   {root}/report/report.html")
    print(f"next     {nemo} distill train --help    # with checkpoints of your own")

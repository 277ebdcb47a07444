"""The commands of `nemo distill`. Light at import: torch and Megatron are imported by the commands that need them.

A recipe is a `run.Partial(distill, ...)`. `train` launches one through NeMo-Run. Unlike NeMo-Run's own task commands it
exits non-zero when a rank fails.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from inspect import getdoc
from typing import Any, Literal

from distill_nemo.benchmarks.entry import evaluate
from distill_nemo.cli.arguments import find_recipe
from distill_nemo.cli.compress import CompressCommand, CompressContext, compress
from distill_nemo.cli.entrypoint import Command, register
from distill_nemo.cli.help import summary, train_help
from distill_nemo.cli.jobs import (
    EvaluateCommand,
    EvaluateContext,
    ExportCommand,
    ExportContext,
    PruneCommand,
    PruneContext,
    TeacherCommand,
    TeacherContext,
)
from distill_nemo.cli.launch import TrainContext, registered_recipes
from distill_nemo.cli.plan import PlanCommand, PlanContext, plan
from distill_nemo.config import CutConfig, ExportConfig, ParallelismConfig
from distill_nemo.executors import EXECUTORS, detached, run_config_of
from distill_nemo.pruning.entry import prune
from distill_nemo.quantization import ExportFormatName
from distill_nemo.runtime.errors import errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.teacher_store_jobs.entry import teacher
from distill_nemo.training.entry import distill


class ReportCommand(Command):
    """`report`."""

    words = "runs"


class RecipesCommand(Command):
    """`recipes`."""

    words = "names"


class TrainCommand(Command):
    """`train`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return train_help(self.fn, {name: executor.arguments for name, executor in EXECUTORS.items()})


def register_commands() -> None:
    """Register the commands with NeMo-Run, in the order of `nemo distill --help`."""
    # NeMo-Run gives -y to two options, and click warns about it on every command with older versions of typer.
    warnings.filterwarnings("ignore", message=r"The parameter -y is used more than once")
    register(distill, name="train", context=TrainContext, command=TrainCommand)
    register(plan, context=PlanContext, kind="experiment", command=PlanCommand)
    register(prepare)
    register(inspect)
    register(teacher, context=TeacherContext, command=TeacherCommand)
    register(export, context=ExportContext, command=ExportCommand)
    register(prune, context=PruneContext, command=PruneCommand)
    register(compress, context=CompressContext, command=CompressCommand)
    register(convert)
    register(evaluate, context=EvaluateContext, command=EvaluateCommand)
    register(recipes, command=RecipesCommand)
    register(report, command=ReportCommand)
    for function in (status, logs, cancel):
        register(function)


def prepare(
    inputs: str,
    output: str,
    tokenizer: str,
    text_key: str = "text",
    format: Literal["text", "chat", "instruction", "preference"] | None = None,
    loss_on: Literal["assistant", "last", "all"] | None = None,
    chat_template: str = "",
    num_workers: int = 0,
    max_bad_records: int = 0,
    pack: int | None = None,
    too_long: Literal["cut", "drop"] | None = None,
) -> None:
    """Tokenise text or conversations into the .bin/.idx files that training reads.

    Conversations are rendered with the tokenizer's chat template. A .mask file says which of their tokens count.

    Several processes share the work. The same command resumes an interrupted job. At the end it prints documents,
    tokens, tokens per second, and bad records with file and line.

    Example:
        nemo distill prepare inputs='text/*.jsonl,more/' output=data/corpus tokenizer=/models/Llama-3.2-1B
        nemo distill prepare inputs='chats/*.jsonl' output=data/chat tokenizer=/models/Qwen3-1.7B pack=4096

    Args:
        inputs: files, directories or globs, separated by commas: text, JSON lines or arrays, CSV, TSV, parquet, Arrow;
            all but the last two also compressed.
        output: prefix of the files to write.
        tokenizer: a Hugging Face tokenizer directory, or a name on the Hub.
        text_key: JSON key or column of the text; with format=chat, of the messages, if their key is not a known one.
        format: chat (messages, conversations), instruction (prompt/completion, instruction/output, question/answer),
            preference (chosen) or text; by default, that of the first record, by its keys.
        loss_on: tokens of conversations that count: assistant (default), last (its last turn) or all.
        chat_template: file of a Jinja template to use in place of the tokenizer's.
        num_workers: processes; 0 means one per core.
        max_bad_records: unreadable records to skip before giving up.
        pack: pack whole documents into samples of this many tokens, the data.sequence_length of the training.
        too_long: cut or drop documents that are longer than a pack; by default texts are cut, conversations dropped.
    """
    from distill_nemo.data.inputs import split_inputs
    from distill_nemo.data.prepare import prepare as prepare_files

    prepare_files(
        split_inputs(inputs),
        output,
        tokenizer,
        text_key=text_key,
        num_workers=num_workers or None,
        max_bad_records=max_bad_records,
        format=format,
        loss_on=loss_on,
        chat_template=chat_template or None,
        pack=pack,
        too_long=too_long,
    )


def inspect(data: str, samples: int = 3, tokenizer: str = "") -> None:
    """Show documents of token files as text, with the tokens that count in green, and where packs begin.

    Of a teacher store, show windows, and what the teacher says of some tokens that it teaches.

    Example:
        nemo distill inspect data=data/chat samples=5

    Args:
        data: prefix of the .bin/.idx files, or directory of a store.
        samples: number of documents, packs or windows, spread over the data.
        tokenizer: a Hugging Face tokenizer directory; by default the one that made the files.
    """
    from rich.console import Console

    from distill_nemo.data.inspect import inspect_documents
    from distill_nemo.data.inspect_store import inspect_windows
    from distill_nemo.teacher_store.manifest import is_store

    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    show = inspect_windows if is_store(data) else inspect_documents
    show(data, samples, tokenizer or None, Console())


def export(
    checkpoint: str,
    output: str,
    tokenizer: str | None = None,
    copy_untouched: bool = False,
    quantized: ExportFormatName = "modelopt",
    push_to: str | None = None,
    push_private: bool = False,
    push_overwrite: bool = False,
    parallelism: ParallelismConfig | None = None,
) -> None:
    """Write a saved step as a Hugging Face directory, and check that it gives the same logits; push it if asked.

    A completed run has already exported its last step (`checkpoint.export`). This is for other steps and runs.

    Example:
        nemo distill export checkpoint=runs/quickstart/distilled output=student
        nemo distill export checkpoint=runs/big/checkpoints/step_00004000 output=student_4000 tokenizer=/models/tok
        nemo distill export checkpoint=runs/big output=student run.executor=local run.executor.processes=8
        nemo distill export checkpoint=runs/big output=student push_to=ORG/NAME push_private=true

    Args:
        checkpoint: a run's output directory, its checkpoints directory, or one step_* directory.
        output: the Hugging Face directory to write.
        tokenizer: tokenizer directory to copy beside the weights.
        copy_untouched: copy tensors that the student's source has and the student lacks: layers that predict further
            tokens, a vision tower. They are as they were before the training.
        quantized: format of a quantised student. modelopt is read by vLLM, SGLang and TensorRT-LLM, its integers by
            the last alone; compressed-tensors by vLLM, SGLang and transformers; none: its rounded weights in the dtype
            of the training, which everything reads.
        push_to: ORG/NAME[@BRANCH] on the Hugging Face Hub to push the output to, with the token in HF_TOKEN.
        push_private: make a private repository, and refuse one that is public.
        push_overwrite: replace weights, config.json and card there that were not pushed from this output.
        parallelism: layout; without these fields, that of the run, reduced to the ranks that there are.
    """
    from distill_nemo.checkpoint.export import export as export_checkpoint

    push = {"push_to": push_to, "push_private": push_private, "push_overwrite": push_overwrite}
    with errors_of_a_rank():
        export_checkpoint(ExportConfig(checkpoint, output, tokenizer, copy_untouched, quantized, parallelism, **push))


def convert(checkpoint: str, output: str, allow_pickle: bool = False) -> None:
    """Convert a Hugging Face checkpoint with pickled weights to safetensors, which training reads.

    Example:
        nemo distill convert checkpoint=/models/old output=/models/new allow_pickle=true
        nemo distill convert checkpoint=ORG/NAME output=/models/new allow_pickle=true

    Args:
        checkpoint: directory with config.json and pytorch_model*.bin, or its name on the Hub.
        output: directory to write.
        allow_pickle: true if you trust these weights; a pickle can run code when it is opened.
    """
    with megatron_imports():
        from distill_nemo.models.checkpoints.pickled import convert as convert_weights

    convert_weights(checkpoint, output, allow_pickle)


def recipes(names: list[str] | None = None) -> None:
    """List the recipes: models and sizes; planned layout, memory and cost; loss.

    With names, show these in full: the command, a plan for each kind of GPU, published and expected results.

    Example:
        nemo distill recipes
        nemo distill recipes qwen3_32b_to_4b

    Args:
        names: recipes to show in full.
    """
    from distill_nemo.planning.report import layout_text

    known, cuts = registered_recipes(), registered_recipes(compress)
    for name in names or []:
        print(f"{name}: {getdoc(find_recipe(name, known | cuts))}\n")
    for name, recipe in {} if names else known.items():
        config = run_config_of(recipe())
        loss = config.distillation.divergence if config.teacher else "LM loss"
        _show(name, recipe, _planned(recipe) or layout_text(config.parallelism), loss)
    for name, recipe in {} if names else cuts.items():
        values = recipe().__arguments__
        sizes = [f"{each.name} {values[each.name]:g}" for each in fields(CutConfig) if each.name in values]
        _show(name, recipe, " ".join(["compress", *sizes]), _planned(recipe), values["distillation"].divergence)


def _planned(recipe: Callable[..., Any]) -> str:
    """Return the line of a recipe's docstring that says its layout and cost on H100s; empty if there is none."""
    planned = re.search(r"^ *(\d+ x H100: .*)$", recipe.__doc__ or "", re.M)
    return planned[1] if planned else ""


def _show(name: str, recipe: Callable[..., Any], *about: str) -> None:
    print(f"{name:30} {summary(recipe)}\n{'':30} {'; '.join(part for part in about if part)}")


def report(
    output: str,
    runs: list[str] | None = None,
    prompts: list[str] | None = None,
    scores: list[str] | None = None,
    follow: bool = False,
) -> None:
    r"""Write a page on any runs: curves, metrics, settings, cost, benchmarks, generated text.

    Runs are output directories: words without "=", as many as you like, or runs='["runs/a", "runs/b"]'.

    Example:
        nemo distill report runs/quickstart/alone runs/quickstart/distilled output=report \
            prompts='["def __init__(self", "import "]'
        nemo distill report runs/llama32_3b_to_1b output=report scores='["scores"]' follow=true
        nemo distill report output=report scores='["scores"]'

    Args:
        output: directory for report.html and its plots.
        runs: output directories of runs; none for a page of scores alone.
        prompts: prompts that the exported students continue.
        scores: output directories of `nemo distill evaluate`.
        follow: rewrite the page while a run goes on; ends with the last run, or at Ctrl-C.
    """
    from distill_nemo.reports.report import report as write_report

    write_report(runs or [], output, prompts or [], scores or [], follow)


def status(experiment: str) -> None:
    """Show the state of a run's jobs on a cluster, one per line.

    Exit code: 1 if a job has ended without completing, with the reason; else 0.

    Example:
        nemo distill status experiment=train_1764030000000000000

    Args:
        experiment: the id that `--detach` printed.
    """
    detached.status(experiment)


def logs(experiment: str, follow: bool = False) -> None:
    """Show the output of a run's ranks on a cluster, from every attempt.

    Example:
        nemo distill logs experiment=train_1764030000000000000 follow=true

    Args:
        experiment: the id that `--detach` printed.
        follow: continue until the jobs have ended, and exit as `train` does.
    """
    detached.logs(experiment, follow)


def cancel(experiment: str) -> None:
    """Cancel the jobs of a run on a cluster. The same command as before resumes the run.

    Example:
        nemo distill cancel experiment=train_1764030000000000000

    Args:
        experiment: the id that `--detach` printed.
    """
    detached.cancel(experiment)

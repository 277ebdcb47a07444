"""Text of `--help`, generated from signatures, docstrings and config fields."""

import contextlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any

from typer.core import TyperCommand, TyperGroup

from distill_nemo.config import RunConfig
from distill_nemo.fields import help_of, required_fields, sections_of, type_name

WIDTH = 110

GROUP = """\
Usage: nemo distill COMMAND [FIELD=VALUE ...]

Distil large language models on Megatron-Core.

Commands:
{commands}

`nemo distill COMMAND --help` describes one of them, with an example and every field.

In minutes, without GPU, weights or network:
  nemo distill quickstart

With your own checkpoints and text:
  nemo distill prepare inputs='text/*.jsonl' output=data/corpus tokenizer=/models/Llama-3.2-1B
  nemo distill train llama32_3b_to_1b \\
      teacher.checkpoint=/models/Llama-3.2-3B student.checkpoint=/models/Llama-3.2-1B \\
      data.train='["data/corpus"]' run.executor=local run.executor.processes=8
  nemo distill plan ...          memory and hours of a run, and whether it fits; takes the arguments of `train`
  nemo distill report runs/a runs/b output=report            a page on any runs: curves, metrics, settings, cost
  nemo distill evaluate model=runs/llama32_3b_to_1b/student data=data/held_out teacher=/models/Llama-3.2-3B
"""

TRAIN = """\
Recipe:
  NAME as the first argument, or --factory NAME. A recipe can have arguments: 'quickstart(steps=20)'.
  `nemo distill recipes` lists them.

Models:
  Any recipe takes any two checkpoints that share a vocabulary:
  teacher.checkpoint=DIRECTORY student.checkpoint=DIRECTORY
  ORG/NAME or ORG/NAME@REVISION in place of a directory is a model on the Hugging Face Hub; docs/launching.md.
  Families, by model_type of config.json:
{families}

Overrides:
  FIELD=VALUE, any number, applied to the recipe. A dot selects a field of a section: optimizer.lr=1e-4.
  Quote lists for the shell: data.train='["30", "a", "70", "b"]'. None unsets a field: teacher=None
  trains on the data alone.

Benchmarks:
  training.benchmark_interval=500 benchmarks.tasks=gsm8k,mmlu   start a second job beside the run, which measures every
  500th step and the last on GPUs of its own; docs/benchmarks.md

Layout:
  gpus=N [gpu=a100-80gb|h100|h200|b200]   choose parallel sizes, micro batch and recomputation: the fastest by the
  planner of those that are exact for both models and fit N GPUs (h100). It says which and why. Fields that you set
  stay. Without gpus=, the recipe's layout is used.

Executor:
  run.executor=local [run.executor.processes=N]   N ranks under torchrun on this machine; the default is one
  run.executor=slurm run.executor.nodes=2 run.executor.devices=8 ...   a cluster: fields below, docs/launching.md

Options:
  --dryrun       show what would run, or the script that would be submitted; starts nothing, needs no cluster
  --detach       return once a scheduler has the job; `nemo distill status|logs|cancel` follow it. No effect on
                 local runs
  --name NAME    name of the run in NeMo-Run's experiments
  --yes          for scripts; no effect, as nothing is ever asked

The same command resumes an interrupted run. Exit code: 0 if every rank succeeded.
"""

PLAN = """\
Takes the arguments of `nemo distill train`: recipe, overrides and run.executor.*, without which there is one rank.
`nemo distill train --help` lists them. Starts and writes nothing; the data need not exist yet.
For a checkpoint that is not on this machine, give its architecture: student.checkpoint=None student.num_layers=16 ...

Exit code: 0 if the run fits; 1 if it does not, with changes that would make it fit."""

ON_RANKS = """\
Executor:
  Without one, the command is this process, on one GPU if there is one. run.executor=NAME run.executor.FIELD=VALUE, as
  for `nemo distill train`, starts ranks that share the model and the work. The same command goes on after an
  interruption and keeps the files that are whole.

Options:
  --dryrun, --detach, --name, --yes as for `nemo distill train`"""

EVALUATE = f"""\
Held-out data:
  Means per token, in nats, computed as during training. With several prefixes, each is a domain with a row of its own.

Benchmarks:
  lm-evaluation-harness itself (pip install 'distill-nemo[eval]') opens each model as a Hugging Face directory; other
  checkpoints are exported to OUTPUT/exported first. `lm_eval ls tasks` lists its tasks. They fetch their data from the
  Hugging Face hub, and with HF_HUB_OFFLINE=1 take it from the cache. Tasks in include_path can name files instead
  (docs/benchmarks.md).
  No code of models or data sets is run, and none of include_path unless allow_code=true.
  Each task of each model is a file in OUTPUT/results, written when it is complete. The table is OUTPUT/scores.json, and
  `nemo distill report RUN scores='["OUTPUT"]' output=report` shows it.

Steps of a run:
  With steps_of=RUN, each step that the run saves is measured by all tasks, in a job of its own: training never waits.
  `nemo distill train benchmarks.tasks=...` starts it, too. Started by itself, before the run, beside it or after it, it
  ends with the run. training.benchmark_interval says which steps. Scores are in RUN/benchmarks.jsonl, and in the run's
  report.

{ON_RANKS}"""

STORE = f"""\
Codecs:
  sampled  draws from the teacher at `temperature`. A student learns from them by forward KL without bias. 50 draws
           usually take 50 to 130 bytes a token, fewer if the teacher is confident. The default.
  top_k    the k most likely ids with their log-probabilities, and the mass of the rest: 4 or 5 bytes for each of the k.
  hidden   the teacher's last hidden states: every divergence and temperature, exactly, at 2 bytes for each channel.

{ON_RANKS}

Several such commands may write on one store at once; the layout may change. Exit code: 0 if the store is complete."""

COMPRESS = """\
Stages:
  prune     OUTPUT/pruned: the layers, channels, heads and experts that matter most, as `nemo distill prune` finds them
  distil    OUTPUT/student: a run with the teacher, as `nemo distill train`
  evaluate  OUTPUT/evaluation.json: teacher, pruned and distilled student on held-out text
  report    OUTPUT/report/report.html
  With rounds=N, the first two are repeated. Each stage is a job of its own. The distillation has all nodes, pruning and
  evaluation the fewest that hold the model, the report one rank.

Recipe:
  NAME as the first argument, or --factory NAME; without one, minitron. FIELD=VALUE overrides its fields.
{recipes}

Layout:
  gpus=N [gpu=a100-80gb|h100|h200|b200]   choose the layout of the distillation, as `nemo distill train` does; pruning
  and evaluation take over its tensor, pipeline and expert parallel sizes

Executor:
  run.executor=local|slurm|kubernetes run.executor.FIELD=VALUE, as for `nemo distill train`. SLURM gets all jobs at
  once, each waiting for the one before it. On Kubernetes this command submits one after the other.

Options:
  --dryrun, --detach (SLURM), --name, --yes as for `nemo distill train`

The same command goes on after a kill in any stage, with the same result. `nemo distill compress plan` says what it
will cost. Exit code: 0 if every stage succeeded.
"""

COMPRESS_PLAN = """\
Takes the arguments of `nemo distill compress`, and those below. Starts and writes nothing; the data need not exist yet.

Exit code: 0 if every stage fits; 1 if one does not, with changes that would make it fit."""

STORE_PLAN = """\
Takes the arguments of `nemo distill teacher`, and those below. Starts and writes nothing. With windows=, the data need
not exist yet.

Exit code: 0 if the job fits; 1 if it does not, with a layout that would, or if the disk has too little room."""

VERIFY = """\
Exit code: 0 if the store is intact and still the teacher's; 1 names the shard that is not."""


class Group(TyperGroup):
    """`nemo distill`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        lines = [f"  {name:12}{command.help}" for name, command in self.commands.items()]
        formatter.write(GROUP.format(commands="\n".join(lines)))


def command_class(text: Callable[[], str]) -> type[TyperCommand]:
    """Return a command class whose `--help` prints `text()`."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            formatter.write(text())

        def invoke(self, ctx: Any) -> Any:
            if ctx.params.get("run_name") == "":  # NeMo-Run would ignore it
                print("error: --name is empty", file=sys.stderr)
                ctx.exit(1)
            out: Any = _Skipping(sys.stdout, "Configuring global options\n")
            with contextlib.redirect_stdout(out):
                return super().invoke(ctx)

    return Command


class _Skipping:
    """`out` without `text` at its beginning, which NeMo-Run prints when it reads its own options."""

    def __init__(self, out: Any, text: str) -> None:
        self._out, self._text = out, text

    def write(self, text: str) -> int:
        if text and self._text.startswith(text):
            self._text = self._text[len(text) :]
            return len(text)
        self._text = ""
        return self._out.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def summary(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring."""
    return (function.__doc__ or "").strip().splitlines()[0]


def command_help(name: str, function: Callable[..., Any], options: str = "", recipe: str = "") -> str:
    """Return the page of a command whose fields are the arguments of `function`."""
    parts = _sections(function)
    rows = _rows(function)
    usage = f"Usage: nemo distill {name}{recipe}{' FIELD=VALUE ...' if rows else ''}{' [OPTIONS]' if options else ''}"
    page = [usage, parts[""], _example(parts), options, "Fields:\n" + "\n".join(rows) if rows else ""]
    return "\n\n".join(part for part in page if part) + "\n"


def _rows(function: Callable[..., Any], prefix: str = "") -> list[str]:
    """Return a row for every argument, and for every field of one that is a section."""
    listed = _sections(function).get("Args", "")
    about = dict(re.findall(r"^    (\w+): (.*?)(?=\n    \w|\Z)", listed, re.M | re.S))
    hints = typing.get_type_hints(function)
    sections = sections_of(hints)
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if name == "ctx":
            continue
        if name in sections:
            rows.append(f"{name}: {about.get(name, '')}")
            rows += _field_rows(typing.get_type_hints(sections[name]), sections[name], f"{name}.")
        else:
            rows.append(_row(f"{prefix}{name}", hints[name], parameter.default, about.get(name, "")))
    return rows


def train_help(function: Callable[..., Any], executors: dict[str, Callable[..., Any]]) -> str:
    """Return the page of `train`: every dotted field, with its default where no recipe sets it."""
    from distill_nemo.models.families import FAMILIES

    families = textwrap.fill(", ".join(FAMILIES), WIDTH, initial_indent="  ", subsequent_indent="  ")
    parts = _sections(function)
    usage = "Usage: nemo distill train RECIPE [FIELD=VALUE ...] [run.executor=EXECUTOR] [OPTIONS]"
    page = [
        usage,
        parts[""],
        _example(parts),
        TRAIN.format(families=families),
        "Fields, with their values unless the recipe sets others:",
    ]
    hints = typing.get_type_hints(RunConfig)
    page += _field_rows({name: hint for name, hint in hints.items() if name not in sections_of(hints)}, RunConfig, "")
    page += _section_pages(RunConfig)
    for name, factory in executors.items():
        page.append("\n".join([f"run.executor={name}: {summary(factory)}", *_rows(factory, "run.executor.")]))
    return "\n\n".join(page) + "\n"


def config_help(name: str, function: Callable[..., Any], config: type, text: str, sections: str | None = None) -> str:
    """Return the page of a command whose fields are those of `config`; `sections` stands for those of its sections."""
    parts = _sections(function)
    page = [f"Usage: nemo distill {name} FIELD=VALUE ... [OPTIONS]", parts[""], _example(parts), text]
    hints = typing.get_type_hints(config)
    own = dict.fromkeys([*required_fields(config), *(name for name in hints if name not in sections_of(hints))])
    page.append("Fields:\n" + "\n".join(_field_rows({name: hints[name] for name in own}, config, "")))
    page += _section_pages(config) if sections is None else [sections]
    return "\n\n".join(page) + "\n"


def _section_pages(config: type) -> Iterator[str]:
    for name, section in sections_of(typing.get_type_hints(config)).items():
        about = [inspect.cleandoc(cls.__doc__ or "") for cls in section.__mro__[:-1]]
        rows = _field_rows(typing.get_type_hints(section), section, f"{name}.")
        yield "\n".join([f"{name}: " + "\n".join(about).replace("`", ""), *rows])


def _field_rows(hints: dict[str, Any], section: type, prefix: str) -> Iterator[str]:
    known = {each.name: each for each in fields(section)}
    for name, hint in hints.items():
        each = known[name]
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        yield _row(f"{prefix}{name}", hint, default, help_of(each.metadata))


def _row(name: str, hint: Any, default: Any, about: str) -> str:
    head = f"  {name}: {type_name(hint)}{'' if default is inspect.Parameter.empty else f' = {default!r}'}"
    about = " ".join(about.split())
    if len(head) + len(about) + 2 <= WIDTH:
        return f"{head:42}  {about}".rstrip()
    return f"{head}\n{textwrap.fill(about, WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"


def _sections(function: Callable[..., Any]) -> dict[str, str]:
    pieces = re.split(r"^(Args|Example|Raises):\n", inspect.getdoc(function) or "", flags=re.M)
    return {
        "": pieces[0].strip(),
        **{title: body.rstrip() for title, body in zip(pieces[1::2], pieces[2::2], strict=True)},
    }


def _example(parts: dict[str, str]) -> str:
    return f"Example:\n{parts['Example']}" if "Example" in parts else ""

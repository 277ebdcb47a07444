"""`nemo distill report`: the page of any runs, once or while they go on."""

import math
import time
from dataclasses import replace
from pathlib import Path

from distill_nemo.checkpoint.directory import BENCHMARKS
from distill_nemo.reports.comparison import Row, perplexity
from distill_nemo.reports.page import Page, lock_of, write_page
from distill_nemo.reports.planned import plans_of
from distill_nemo.reports.runs import SHOWN, RecordedRun, exported_parameters, is_going_on, read_runs
from distill_nemo.reports.samples import generate
from distill_nemo.reports.scores import SCORES, read_scores
from distill_nemo.runtime.metrics_file import finite

MAX_RUNS, MAX_PROMPTS = 20, 20
OF_A_RUN = ("config.yaml", "metrics.jsonl")  # a run has at least one of these
SECONDS = 2.0  # between two looks at the metrics
HELD_OUT = ("train", "valid", "split", "sequence_length")  # fields of `data` that decide what a run is evaluated on


def report(directories: list[str], output: str, prompts: list[str], scores: list[str], follow: bool) -> None:
    """Write the page of the runs in `directories` to `output`; with `follow`, again whenever their metrics grow.

    A page may also be of `scores` alone, output directories of evaluations.

    Text is generated at the end. A report that follows ends with the last run, or at Ctrl-C.

    Raises:
        ValueError: for too many runs or prompts, a directory that is missing, no run, or named twice, or none; for
            scores that cannot be read; or if another process writes to `output`.
    """
    _check(directories, prompts, scores)
    for directory in scores:
        read_scores(Path(directory) / SCORES)
    with lock_of(Path(output)):
        _report(_Pages(directories, Path(output), scores), prompts, follow)


def _report(pages: "_Pages", prompts: list[str], follow: bool) -> None:
    try:
        pages.write()
        while follow and any(is_going_on(Path(directory)) for directory in pages.directories):
            time.sleep(SECONDS)
            pages.write_if_changed()
    except KeyboardInterrupt:
        print("stopped following; the page is the last one written", flush=True)
        return
    if follow:
        pages.write_if_changed()
    if prompts:
        pages.write(prompts)
    print(f"report: {pages.path}", flush=True)


def _check(directories: list[str], prompts: list[str], scores: list[str]) -> None:
    if not (directories or scores) or len(directories) > MAX_RUNS:
        raise ValueError(f"name 1 to {MAX_RUNS} output directories of runs, or scores=, got {len(directories)}")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"prompts: at most {MAX_PROMPTS}, got {len(prompts)}")
    missing = [directory for directory in directories if not Path(directory).is_dir()]
    if missing:
        raise ValueError(f"no such directory: {missing[0]}; name the output_dir of a run")
    for directory in directories:
        if not any((Path(directory) / name).is_file() for name in OF_A_RUN):
            raise ValueError(f"{directory} holds neither {' nor '.join(OF_A_RUN)}: name the output_dir of a run")
    if len({Path(directory).resolve() for directory in directories}) < len(directories):
        raise ValueError(f"a run is named twice: {', '.join(directories)}; name each once")


class _Pages:
    """The page of some runs and scores, written again and again."""

    def __init__(self, directories: list[str], output: Path, scores: list[str]) -> None:
        self.directories, self.output, self.scores = directories, output, scores
        self.path = output / "report.html"
        self.sizes: list[int] = []

    def write(self, prompts: list[str] | None = None) -> None:
        """Write the page, with text for the prompts."""
        self.sizes = self._sizes()
        page = page_of(read_runs(self.directories), prompts or [])
        page.scores.update({directory: read_scores(Path(directory) / SCORES) for directory in self.scores})
        self.path = write_page(self.output, page)

    def write_if_changed(self) -> None:
        """Write the page if any metrics or scores have grown."""
        if self._sizes() != self.sizes:
            self.write()

    def _sizes(self) -> list[int]:
        files = [Path(directory) / "metrics.jsonl" for directory in self.directories]
        files += [Path(directory) / BENCHMARKS / SCORES for directory in self.directories]
        files += [Path(directory) / SCORES for directory in self.scores]
        return [file.stat().st_size if file.is_file() else 0 for file in files]


def page_of(runs: list[RecordedRun], prompts: list[str]) -> Page:
    """Return the page of recorded runs: their last evaluations, plans, benchmarks, and text of exported students."""
    plans, notes = plans_of(runs)
    held_out = "The last evaluation of each run, on its own held-out data"
    page = Page(runs, last_evaluations(runs), held_out, plans, notes=notes)
    for run in runs:
        try:
            if (path := run.directory / BENCHMARKS / SCORES).is_file():
                page.scores[run.name] = read_scores(path)
        except ValueError as error:
            notes[run.name].append(f"no benchmarks: {error}"[:SHOWN])
    for run in runs if prompts else []:
        try:
            texts = generate(str(run.directory / "student"), prompts)
        except ValueError as error:
            notes[run.name].append(f"no text: {error}")
            continue
        named = zip(prompts, texts, strict=True)
        page.samples.extend({"model": run.name, "prompt": prompt, "text": text} for prompt, text in named)
    if len({_held_out(run) for run in runs if run.config}) > 1:
        return replace(page, measured_on=f"{page.measured_on}, which differs: their numbers are not comparable")
    return page


def _held_out(run: RecordedRun) -> str:
    assert run.config is not None
    data = {name: vars(run.config.data)[name] for name in HELD_OUT}
    if run.config.data.valid:
        del data["train"], data["split"]
    return str(data | {"eval_batches": run.config.training.eval_batches})


def last_evaluations(runs: list[RecordedRun]) -> list[Row]:
    """Return a row for each run that was evaluated, and one for each teacher."""
    rows: list[Row] = []
    teachers: dict[float, str] = {}
    for run in runs:
        found = run.last_evaluation
        loss = finite(found.get("lm_loss"))
        if found:
            named = {name: found.get(name) for name in ("lm_loss", "forward_kl", "top1_agreement")}
            named |= {"perplexity": perplexity(loss)}
            rows.append({"model": run.name, "parameters": exported_parameters(run.directory / "student"), **named})
        teachers.setdefault(finite(found.get("teacher_lm_loss")), run.name)
    known = {loss: name for loss, name in teachers.items() if not math.isnan(loss)}
    for loss, name in known.items():
        title = "frozen teacher" if len(known) == 1 else f"frozen teacher of {name}"
        rows.insert(0, {"model": title, "lm_loss": loss, "perplexity": perplexity(loss)})
    return rows

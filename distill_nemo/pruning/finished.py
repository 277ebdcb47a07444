"""Stages of a compression that an earlier call has finished, by their results. No weights are read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill_nemo.checkpoint.directory import checkpoint_root, step_directory
from distill_nemo.checkpoint.hub_models import described
from distill_nemo.config import ParallelismConfig, PruneConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.config_files import from_dict, load_yaml, to_dict
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.token_files import named_corpora
from distill_nemo.models.resolve import resolve
from distill_nemo.pruning.foreseen import Round
from distill_nemo.pruning.possible import possible_sizes
from distill_nemo.pruning.record import RECORD, earlier_record, identity_of
from distill_nemo.pruning.sizes import evenly_spaced
from distill_nemo.pruning.stages import CompressConfig
from distill_nemo.reports.compressed import EVALUATION, read_rows


def finished_stages(config: CompressConfig, rounds: Sequence[Round]) -> int:
    """Return the number of stages, from the first on, whose results are there and are newer than what they came from.

    The report is not among them: it is cheap, and its prompts may be others.
    """
    return next(number for number, finished in enumerate(_finished(config, rounds)) if not finished)


def _finished(config: CompressConfig, rounds: Sequence[Round]) -> Iterator[bool]:
    for number, each in enumerate(rounds, 1):
        yield _is_cut(from_dict(to_dict(each.cut), PruneConfig))
        yield _is_distilled(from_dict(to_dict(config.run(number))))
    run = config.run(config.rounds)
    students = [Path(str(run.student.checkpoint)), _student(run)]
    files = [file for path in students for file in path.iterdir() if file.is_file()]
    yield read_rows(config.output) is not None and _is_newer(Path(config.output, EVALUATION), files)
    yield False  # the report


def _is_cut(cut: PruneConfig) -> bool:
    """Return True if the cut's result has the identity that `prune` would give it."""
    if not Path(cut.output, RECORD).is_file():
        return False
    try:
        model = resolve(StudentConfig(checkpoint=described(cut).model))
        layers_of = partial(evenly_spaced, model)
        possible = possible_sizes(model, cut, cut.parallelism or ParallelismConfig(), layers_of)
    except ValueError:  # of an earlier round's student, which will be another
        return False
    return earlier_record(Path(cut.output), identity_of(cut, model, possible)) is not None


def _is_distilled(run: RunConfig) -> bool:
    """Return True if the run has taken all steps by this config, and has exported its student since."""
    assert run.teacher is not None, "a compression distils"
    try:
        saved = load_yaml(Path(run.output_dir, "config.yaml"))
    except ValueError:  # missing, or of another version
        return False
    student, teacher = StudentConfig(run.student.checkpoint), TeacherConfig(run.teacher.checkpoint)  # as in `run`
    last = step_directory(checkpoint_root(run.output_dir), run.training.steps) / "SHA256SUMS"
    data = [file for _, path in named_corpora(run.data) for file in corpus_at(path).files.values()]
    same = replace(saved, student=student, teacher=teacher) == run
    return same and _is_newer(_student(run) / "config.json", [last, *data])


def _student(run: RunConfig) -> Path:
    return Path(run.output_dir, "student")


def _is_newer(result: Path, sources: Sequence[Path]) -> bool:
    """Return True if all files are there, and the result was written after every source."""
    if not all(path.is_file() for path in (result, *sources)):
        return False
    return result.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in sources)

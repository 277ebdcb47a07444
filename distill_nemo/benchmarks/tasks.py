"""Checks of benchmarks before a model is opened, by a launcher, too. Light at import."""

import re
from collections.abc import Container
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from distill_nemo.benchmarks.task_files import check_task_files, task_files
from distill_nemo.fields import require
from distill_nemo.job_config import EvaluateConfig, words_of

_NAME = re.compile(r"^\s*(?:- )?(?:task|group|tag):\s*['\"]?([^\s'\"#]+)", re.M)


def check_tasks(config: EvaluateConfig, work_dir: Path = Path()) -> None:
    """Refuse benchmarks without the harness, and tasks that run code.

    Args:
        config: has tasks.
        work_dir: to which a relative `include_path` refers.

    Raises:
        ValueError: saying what to install, or as `check_task_files` does.
    """
    try:
        version("lm_eval")
    except PackageNotFoundError:
        raise ValueError("tasks needs lm-evaluation-harness: pip install 'distill-nemo[eval]'") from None
    if config.include_path is None:
        return
    directory = work_dir / config.include_path
    require(directory.is_dir(), f"include_path = {directory} is not a directory")
    if not config.allow_code:
        check_task_files(directory, known_metrics())


def known_metrics() -> Container[str]:
    """Return the names of the harness's own metrics; it would download any other, and run it."""
    import lm_eval.api.metrics  # noqa: F401  registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    return METRIC_REGISTRY


def check_names(config: EvaluateConfig, work_dir: Path = Path()) -> None:
    """Refuse unknown tasks. Their names are looked for in the files of tasks; the harness is asked about others alone.

    Raises:
        ValueError: as `harness.task_manager`.
    """
    left = set(words_of(config.tasks))
    package = find_spec("lm_eval")
    assert package is not None and package.origin is not None, "`check_tasks` has found it"
    of_user = None if config.include_path is None else work_dir / config.include_path
    files = chain([] if of_user is None else task_files(of_user), Path(package.origin).parent.glob("tasks/**/*.yaml"))
    while left and (file := next(files, None)):
        left.difference_update(_NAME.findall(file.read_text(errors="replace")))
    if left:  # perhaps named in other ways
        from distill_nemo.benchmarks.harness import task_manager

        task_manager(sorted(left), replace(config, include_path=of_user and str(of_user)), Path())

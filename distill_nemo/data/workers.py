"""Processes of `prepare`: each makes parts of the token files, in any order."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType

from distill_nemo.data.parts import Part, make_part, read_part, start_worker
from distill_nemo.data.progress import reporter


def make_parts(parts: list[Part], num_workers: int | None, max_bad: int, progress: bool) -> tuple[list[dict], int]:
    """Make the missing parts. Return every part's manifest in order, and the number of tokens made now.

    Args:
        parts: all parts of the output.
        num_workers: processes; None means one per available core.
        max_bad: number of bad records beyond which no further part is made.
        progress: show progress on stderr.

    Raises:
        ValueError: for an input that is damaged.
        OSError: if a part cannot be written.
        RuntimeError: if a process died.
    """
    done = {part.prefix: read_part(part) for part in parts}
    todo = [part for part in parts if done[part.prefix] is None]
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(todo))
    old = sum(manifest["tokens"] for manifest in done.values() if manifest)
    with reporter(sum(part.num_bytes for part in todo), progress) as report, _mapper(workers) as run:
        for part, manifest in run(todo):
            done[part.prefix] = manifest
            report(part.num_bytes, manifest["documents"], manifest["tokens"])
            if sum(m["bad_records"] for m in done.values() if m) > max_bad:
                break  # `prepare` refuses it
    made = [manifest for manifest in done.values() if manifest]
    return made, sum(manifest["tokens"] for manifest in made) - old


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[[list[Part]], Iterator[tuple[Part, dict]]]]:
    """Yield a function that makes parts and yields each with its manifest as soon as it is done."""
    if workers <= 1:
        yield lambda parts: ((part, make_part(part)) for part in parts)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)

    def run(parts: list[Part]) -> Iterator[tuple[Part, dict]]:
        with _without_main_module():
            futures = {pool.submit(make_part, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenising process died (killed, perhaps for memory: lower num_workers); run the same command again to "
            "make the missing parts"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide `__main__` from processes that start: each would import the program again, and with it all of NeMo-Run."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

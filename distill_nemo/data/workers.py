"""Processes of `prepare`: each makes parts of the token files, in any order."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType

from distill_nemo.data.parts import Part, forget_tokenizers, make_part, read_part, start_worker
from distill_nemo.data.progress import reporter

Make = Callable[[list[Part]], Iterator[tuple[Part, dict]]]  # begins; yields parts with their manifests as they are done


def make_parts(
    parts: list[Part], make: Make, max_bad: int, progress: bool, meanwhile: Callable[[], object]
) -> tuple[list[dict], int]:
    """Make the missing parts. Return every part's manifest in order, and the number of tokens made now.

    Args:
        parts: all parts of the output.
        make: see `part_makers`.
        max_bad: number of bad records beyond which no further part is made.
        progress: show progress on stderr.
        meanwhile: work for this process, once the others have theirs.

    Raises:
        ValueError: for an input that is damaged.
        OSError: if a part cannot be written.
        RuntimeError: if a process died.
    """
    done = {part.prefix: read_part(part) for part in parts}
    todo = [part for part in parts if done[part.prefix] is None]
    old = sum(manifest["tokens"] for manifest in done.values() if manifest)
    with reporter(sum(part.num_bytes for part in todo), progress) as report:
        begun = make(todo)
        meanwhile()
        for part, manifest in begun:
            done[part.prefix] = manifest
            report(part.num_bytes, manifest["documents"], manifest["tokens"])
            if sum(m["bad_records"] for m in done.values() if m) > max_bad:
                break  # `prepare` refuses it
    made = [manifest for manifest in done.values() if manifest]
    return made, sum(manifest["tokens"] for manifest in made) - old


@contextmanager
def part_makers(number: int) -> Iterator[Make]:
    """Start processes, and yield the function by which they make parts. One is this process.

    They are killed at the end, as at Ctrl-C, which does not reach them. Their parts are then not whole.
    """
    if number <= 1:
        forget_tokenizers()
        yield lambda parts: ((part, make_part(part)) for part in parts)
        return
    workers: dict[Connection, BaseProcess] = {}
    try:
        resource_tracker.ensure_running()  # which would let Ctrl-C through again
        with _without_main_module(), _without_interrupts():
            for _ in range(number):
                pipe, process = _started()
                workers[pipe] = process
        yield partial(_made_by, list(workers))
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def _started() -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that a dead process ends the pipe
    return ours, process


def _work(pipe: Connection) -> None:
    """Make the parts that a pipe brings, and send back the manifest of each, or its error, until the parent ends."""
    start_worker()
    with suppress(EOFError, ConnectionError):
        while True:
            part = pipe.recv()
            try:
                made = make_part(part)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))  # which is not sent with it
                made = error
            pipe.send(made)


def _made_by(pipes: list[Connection], parts: list[Part]) -> Iterator[tuple[Part, dict]]:
    """Give parts to the processes at the other ends of pipes. Return an iterator of the parts with their manifests."""
    todo, making = iter(parts), {}

    def send(idle: list[Connection]) -> None:
        for pipe in idle:
            if part := next(todo, None):
                pipe.send(part)
                making[pipe] = part
            else:
                pipe.close()  # its process ends

    def receive() -> Iterator[tuple[Part, dict]]:
        while making:
            with _death_named():
                idle = [pipe for pipe in wait(list(making)) if isinstance(pipe, Connection)]
                made = [(making.pop(pipe), pipe.recv()) for pipe in idle]
                send(idle)
            for part, result in made:
                if isinstance(result, Exception):
                    raise result
                yield part, result

    with _death_named():
        send(pipes)
    return receive()


@contextmanager
def _death_named() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise RuntimeError(
            "a tokenising process died (killed, perhaps for memory: lower num_workers); run the same command again to "
            "make the missing parts"
        ) from None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C, for good in processes that start meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide `__main__` from processes that start: each would import the program again, and with it all of NeMo-Run."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

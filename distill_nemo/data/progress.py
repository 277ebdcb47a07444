"""Progress of `prepare` on stderr: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reporter(total_bytes: int, show: bool) -> Iterator[Callable[[int, int, int], None]]:
    """Yield a function (new bytes, documents, tokens) -> None that shows progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    documents = tokens = num_bytes = 0
    began = last = time.monotonic()
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("tokenising", total=total_bytes)

        def report(new_bytes: int, new_documents: int, new_tokens: int) -> None:
            nonlocal documents, tokens, num_bytes, last
            documents, tokens, num_bytes = documents + new_documents, tokens + new_tokens, num_bytes + new_bytes
            now = time.monotonic()
            line = f"{documents:,} documents, {tokens:,} tokens, {tokens / (now - began):,.0f} tokens/s"
            bar.update(task, advance=new_bytes, description=line)
            if show and not console.is_terminal and now - last > 10:
                last = now
                print(f"tokenising {num_bytes / max(total_bytes, 1):.0%}: {line}", file=sys.stderr, flush=True)

        yield report

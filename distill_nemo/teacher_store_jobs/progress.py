"""Progress of a store that is written: shards of all jobs, the rate since this job began, and what is left."""

import contextlib
import sys
import time

from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.writer import WrittenShards

SECONDS = 10.0  # between two lines


class StoreProgress:
    """Prints a line now and then. Windows and bytes are those of all jobs that write on the store."""

    def __init__(self, manifest: Manifest, written: WrittenShards) -> None:
        self.manifest, self.written = manifest, written
        self._began = self._printed = time.monotonic()
        self._before = written.num_windows

    def show(self) -> None:
        """Print a line, if the last one is old."""
        moment = time.monotonic()
        if moment - self._printed < SECONDS:
            return
        self._printed = moment
        with contextlib.suppress(OSError, ValueError):  # or rank 0 would end alone; all learn it when they look next
            self.written.missing()
        windows, num_bytes = self.written.num_windows, self.written.num_bytes
        total, rate = self.manifest.num_windows, (windows - self._before) / (moment - self._began)
        left = f", ETA {_clock((total - windows) / rate)}" if rate and windows < total else ""
        print(
            f"store {windows:,} of {total:,} windows ({windows / total:.0%}), {rate:,.2f} windows/s, "
            f"{rate * self.manifest.sequence_length:,.0f} tokens/s, {num_bytes / 1e6:,.1f} MB{left}",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

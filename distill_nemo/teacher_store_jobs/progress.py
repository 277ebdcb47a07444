"""Progress of a store that is written: shards of all jobs, the rate since this job began, and what is left."""

import sys
import time
from pathlib import Path

from distill_nemo.teacher_store.manifest import Manifest

SECONDS = 10.0  # between two lines


class StoreProgress:
    """Prints a line now and then. Windows and bytes are those of all jobs that write on the store."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self._began = self._printed = time.monotonic()
        self._before, _ = self._written()

    def show(self, now: bool = False) -> None:
        """Print a line, if the last one is old or `now`."""
        moment = time.monotonic()
        if not now and moment - self._printed < SECONDS:
            return
        self._printed = moment
        windows, num_bytes = self._written()
        total, rate = self.manifest.num_windows, (windows - self._before) / (moment - self._began)
        left = f", ETA {_clock((total - windows) / rate)}" if rate and windows < total else ""
        print(
            f"store {windows:,} of {total:,} windows ({windows / total:.0%}), {rate:,.2f} windows/s, "
            f"{rate * self.manifest.sequence_length:,.0f} tokens/s, {num_bytes / 1e6:,.1f} MB{left}",
            file=sys.stderr,
            flush=True,
        )

    def _written(self) -> tuple[int, int]:
        shards = [path for path in self.store.glob("shard-*.safetensors")]
        windows = sum(len(self.manifest.windows_of(int(path.stem.removeprefix("shard-")))) for path in shards)
        return windows, sum(path.stat().st_size for path in shards)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

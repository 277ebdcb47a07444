"""Measure time and memory of alternatives in turns, so that a machine's load affects all of them alike."""

import ctypes
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, dict[str, float]]:
    """Return medians of wall and processor seconds over `repeats` rounds, each of which measures every way once.

    With `warm`, every way has run already, and takes long enough not to depend on the way before it. Otherwise each
    runs once right before it is measured, as in a loop of its own, since fresh memory is slower.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            if not warm:
                way()
                _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            _wait()
            seconds[name].append(time.perf_counter() - wall)
            processor[name].append(time.process_time() - cpu)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "fastest_seconds": min(seconds[name]),
            "processor_seconds": statistics.median(processor[name]),
            "fastest_processor_seconds": min(processor[name]),
        }
        for name in ways
    }


def peak_bytes(way: Callable[[], Any]) -> int:
    """Return the peak of memory during a call, beyond the memory before it."""
    _wait()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before, but kept, would be used and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": model[0].split(": ")[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def write_result(what: str, results: dict[str, Any]) -> None:
    """Write benchmarks/results/<what>_<machine>.json, and print the same."""
    where = machine()
    kind = re.search(r"H[12]00|[AB]\d00|EPYC|Xeon|Apple|Neoverse", where["gpu"] or where["cpu"])
    text = json.dumps({"machine": where, **results}, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{what}_{kind[0].lower() if kind else 'other'}.json").write_text(text + "\n")
    print(text)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024

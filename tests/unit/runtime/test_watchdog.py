"""Ranks that a watchdog names when a run hangs. Real ranks that hang: tests/distributed/training/test_faults.py."""

import json
import time

import pytest

from distill_nemo.config import ParallelismConfig
from distill_nemo.runtime import watchdog

MINUTE = 60.0


class Store(dict):
    """Reports of three ranks. Rank 1 lives and its clock is a minute behind; rank 2 has stopped, a minute ahead."""

    def check(self, keys):
        return keys[0] in self or keys[0] != "watchdog/0"

    def get(self, key):
        clock = {"watchdog/1": time.time() - MINUTE, "watchdog/2": self.setdefault("stopped", time.time() + MINUTE)}
        return self[key] if key in self else json.dumps({"clock": clock[key], "doing": "step 9", "where": "read"})

    set = dict.__setitem__


def test_a_rank_is_silent_when_it_says_nothing_new_whatever_its_clock(monkeypatch):
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(watchdog, "open_store", Store)
    reports, began = [], time.monotonic()

    def exit_(watched, message):
        reports.append((time.monotonic() - began, message))
        watched._ended.set()

    monkeypatch.setattr(watchdog.Watchdog, "_exit", exit_)
    with watchdog.Watchdog(1.0) as watched:
        watchdog.heartbeat("step 9")
        assert watched._ended.wait(60)
    seconds, message = reports[0]
    assert message.startswith("rank 2 gives no sign of life, last in: step 9, read; rank 0 is in: step 9, ")
    assert message.endswith("; rank 1 is in: step 9, read") and seconds > watched.seconds


@pytest.mark.parametrize("minutes", [0.1, 2.5])
def test_the_groups_do_not_time_out_before_it(one, minutes):
    assert one.run(groups_timeout, minutes)[0] >= 60 * minutes


def groups_timeout(minutes):
    """Return the timeout in seconds of Megatron's groups."""
    import torch
    from megatron.core import parallel_state

    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(ParallelismConfig(timeout_minutes=minutes)):
        group = parallel_state.get_tensor_model_parallel_group()
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

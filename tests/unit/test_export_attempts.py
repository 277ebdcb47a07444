"""The answer of an export that the other ranks wait for, where torchrun starts a run again with the same store."""

import itertools
import subprocess
from types import SimpleNamespace

import pytest

from distill_nemo.checkpoint import export
from distill_nemo.config import RunConfig, StudentConfig


class Store(dict):
    """torchrun's; to wait for what is not there would last."""

    set = dict.__setitem__

    def wait(self, keys, timeout):
        if keys[0] not in self:
            raise TimeoutError(keys[0])


def test_an_export_that_failed_before_a_restart_is_not_taken_for_this_one(monkeypatch):
    store, codes = Store(), [1, 0]

    def rank(number, attempt):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        monkeypatch.setattr(export.dist, "get_rank", lambda: number)
        monkeypatch.setattr(export, "_exports", itertools.count())
        export.export_from_run(RunConfig("/run", StudentConfig(), None))

    monkeypatch.setattr(export.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(export, "open_store", lambda: store)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=codes.pop(0)))
    for number in range(2):
        with pytest.raises(RuntimeError, match="export failed"):
            rank(number, attempt=0)
    with pytest.raises(TimeoutError):
        rank(1, attempt=1)
    for number in range(2):
        rank(number, attempt=1)

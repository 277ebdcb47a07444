"""What many test files share: the inputs of a tiny run, and processes that have already imported Megatron."""

import os

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.spawn import Gloo
from tests.training import write_inputs

torch.set_num_threads(1)  # as every process of a run; more threads than cores spin


class ByFixtures(LoadScopeScheduling):
    """What shares fixtures runs in one worker: a file, and of the commands all files.

    Marks would do (`--dist loadgroup`), but pytest-xdist 3.8 overlooks them under pytest 9.2.
    """

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "tests/cli" if file.startswith("tests/cli/") else file


def pytest_xdist_make_scheduler(config, log):
    return ByFixtures(config, log)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Directory of `tests.training.write_inputs`."""
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture
def empty_stdin(monkeypatch):
    """Let this process read nothing, where pytest would let it not read at all: NeMo-Run's commands do."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture(scope="session")
def one():
    """One process that joins no group by itself."""
    with Gloo(1, init=False, timeout=200) as group:
        yield group


@pytest.fixture(scope="session")
def two():
    """Two processes that join no group by themselves."""
    with Gloo(2, init=False, timeout=200) as group:
        yield group

"""Fixtures shared by many test files: inputs of a tiny run, and processes that have already imported Megatron."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which Megatron does

from xdist.scheduler import LoadScopeScheduling

from tests.spawn import Gloo
from tests.training import write_inputs

torch.set_num_threads(1)  # like every process of a run; more threads than cores would spin


class ByFixtures(LoadScopeScheduling):
    """Run tests that share fixtures in one worker: those of a file, and all of tests/cli.

    Marks would do (`--dist loadgroup`), but pytest-xdist 3.8 ignores them under pytest 9.2.
    """

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "tests/cli" if file.startswith("tests/cli/") else file


def pytest_xdist_make_scheduler(config, log):
    return ByFixtures(config, log)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # or each collection would take 0.4 s over modules and tests


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Return the directory of `tests.training.write_inputs`."""
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture
def empty_stdin(monkeypatch):
    """Give this process an empty stdin. NeMo-Run's commands read it, which pytest forbids."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture(scope="session")
def one():
    """Return one process that joins no group by itself."""
    with Gloo(1, init=False, timeout=200) as group:
        yield group


@pytest.fixture(scope="session")
def two():
    """Return two processes that join no group by themselves."""
    with Gloo(2, init=False, timeout=200) as group:
        yield group

"""What many test files share: the inputs of a tiny run, and processes that have already imported Megatron."""

import pytest
import torch

from tests.spawn import Gloo
from tests.training import write_inputs

torch.set_num_threads(1)  # as every process of a run; more threads than cores spin


def pytest_collection_modifyitems(items):
    """What shares fixtures runs in one worker: a file, and of the commands all files."""
    for item in items:
        together = item.path.parent if item.path.parent.name == "cli" else item.path
        item.add_marker(pytest.mark.xdist_group(str(together)))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Directory of `tests.training.write_inputs`."""
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


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

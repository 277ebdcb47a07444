"""One run of a full-size recipe, shrunk, that several files look at."""

import pytest

from tests.cli.command import TWO_RANKS, nemo, shrunk


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """`llama32_3b_to_1b` on two ranks, to its end: the directory it ran in, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    return cwd, nemo("train", "--factory", "llama32_3b_to_1b", "--yes", *shrunk(inputs), *TWO_RANKS, cwd=cwd)

"""The hub's double, to which huggingface_hub of this process talks."""

import pytest

from tests.hub import TOKEN, Hub, serving, talking_to


@pytest.fixture
def hub(tmp_path):
    """Return a double with one user, who may write to ORG."""
    with serving(Hub()) as hub, talking_to(hub.url, tmp_path):
        hub.user(TOKEN, "ORG")
        yield hub
        assert hub.refused == []

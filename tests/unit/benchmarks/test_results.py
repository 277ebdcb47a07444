"""A task whose results are damaged counts as not measured."""

import json

import pytest

from distill_nemo.benchmarks.evaluate import earlier_result

WHOLE = {"model": "m", "results": {"arc": {"acc,none": 0.5}}}
DAMAGED = {
    "missing": None,
    "empty": b"",
    "cut": json.dumps(WHOLE).encode()[:-9],
    "zeros": bytes(100),
    "another": b'{"error": 404}',
    "a list": b"[]",
    "no results": b'{"results": null}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_results_are_none(tmp_path, content):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_bytes(content)
    assert earlier_result(file) is None
    file.write_text(json.dumps(WHOLE))
    assert earlier_result(file) == WHOLE

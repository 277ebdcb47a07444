"""JSON and YAML beyond Python's limits: every reader names the file and the limit, not Python's settings."""

import io

import pytest

from distill_nemo.benchmarks.task_files import _read as read_task
from distill_nemo.config_files import load_yaml
from distill_nemo.data.formats import errors_named
from distill_nemo.data.json_values import json_values
from distill_nemo.data.readers import Schema, _of_line
from distill_nemo.models.checkpoints.nemo import read_nemo_config
from distill_nemo.runtime.files import read_object

BEYOND = {
    "integer": ("1" * 5000, "it has an integer of more than 4,300 digits"),
    "brackets": ("[" * 100_000, "its brackets are nested too deeply"),
}
READERS = {"JSON": read_object, "config": load_yaml, "NeMo": read_nemo_config, "task": read_task}


@pytest.mark.parametrize("beyond", BEYOND)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_beyond_a_limit_of_python_is_refused_by_name(tmp_path, reader, beyond):
    text, problem = BEYOND[beyond]
    path = tmp_path / "file"
    path.write_text(f'{{"training": {text}}}')
    with pytest.raises(ValueError, match=f"{path} cannot be read: {problem}"):
        READERS[reader](path)


@pytest.mark.parametrize(("text", "problem"), BEYOND.values(), ids=BEYOND)
def test_a_record_beyond_a_limit_of_python_is_a_bad_one_of_its_line_and_ends_an_array(text, problem):
    record = f'{{"text": {text}}}'
    assert _of_line(record.encode(), Schema("text", "text"), str).problem == f"cannot be read as JSON: {problem}"
    with pytest.raises(ValueError, match=f"in.json cannot be read: the record after record 1 is not read: {problem}"):
        with errors_named("in.json"):
            list(json_values(io.StringIO('[{"text": "a"}, ' + record)))

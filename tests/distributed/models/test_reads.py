"""Each rank reads the description of a model once, and passes it on."""

import sys
from unittest import mock

from tests.training import tiny_run

ROLES = ("student", "teacher")


def descriptions_opened(inputs, output):
    """Count this rank's reads of each model's config.json in a run that is exported."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.checkpoint import export
    from distill_nemo.training.entry import run_config

    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    run = tiny_run(inputs, output, steps=1)
    run.optimizer.warmup_steps, run.checkpoint.export = 0, True
    with mock.patch.object(export, "export_from_run"):  # transformers opens the written files
        run_config(run)
    return {role: opened.count(str(inputs / role / "config.json")) for role in ROLES}


def test_config_json_is_read_once_a_rank(inputs, two, tmp_path):
    """Rank 0 reads it twice more, with transformers, for the independent check of the checkpoint."""
    first, second = two.run(descriptions_opened, inputs, tmp_path)
    assert second == dict.fromkeys(ROLES, 1)
    assert all(count > 1 for count in first.values()), "the count does not see transformers' own reads"

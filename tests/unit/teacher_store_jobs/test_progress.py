"""Progress of a store that is written."""

import pytest

from distill_nemo.teacher_store.writer import WrittenShards
from distill_nemo.teacher_store_jobs import progress
from tests.stores import manifest_of, random_window, write_windows


@pytest.mark.parametrize("error", [OSError("stale file handle"), ValueError("manifest.json is damaged"), None])
def test_a_store_that_cannot_be_read_for_a_moment_ends_nothing(error, tmp_path, monkeypatch, capsys):
    """Rank 0 alone shows progress, while the others wait for it."""
    manifest, store = manifest_of(), tmp_path / "store"
    write_windows(store, manifest, [random_window(manifest, number) for number in range(10)], shards=[0])
    written = WrittenShards(store, manifest)

    def fail():
        raise error

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    if error is not None:
        monkeypatch.setattr(written, "missing", fail)
    progress.StoreProgress(manifest, written).show()
    shown = 4 if error is None else 0
    assert capsys.readouterr().err.startswith(f"store {shown} of 10 windows ({shown / 10:.0%}), ")

"""Files that an interrupted call of `prune` left: taken as it was written, and not at all if it is damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.pruning.choice import Scores
from distill_nemo.pruning.progress import FILE, OF_LAYERS, PROGRESS, earlier_progress, write_progress
from distill_nemo.pruning.record import RECORD, earlier_record, unfinished_record, write_record

WRITTEN = {"identity": "ours", "result": {"sizes": {"num_layers": 2}}, "kept": {"layers": [0, 1], "heads": {2: [0]}}}


@pytest.mark.parametrize(
    "change",
    [{"kept": None}, {"kept": {"layers": [0, 7]}}, {"result": []}, {"sha256": None}, {"more": 1}],
    ids=str,
)
def test_a_changed_record_is_not_gone_on_from(tmp_path, change):
    write_record(tmp_path, WRITTEN)
    assert unfinished_record(tmp_path, "ours")["kept"] == {"layers": [0, 1], "heads": {"2": [0]}}
    assert unfinished_record(tmp_path, "theirs") is None
    (tmp_path / RECORD).write_text(json.dumps(json.loads((tmp_path / RECORD).read_text()) | change))
    assert unfinished_record(tmp_path, "ours") is None
    assert earlier_record(tmp_path, "ours") is not None  # a published cut is still that cut


def some_scores():
    parts = {part: {layer: torch.rand(4, dtype=torch.float64) for layer in (0, 1)} for part in OF_LAYERS}
    return Scores(hidden=torch.rand(8), layers=torch.rand(2), **parts)


def rewritten(file, tensors=None, **metadata):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        stated = opened.metadata()
    save_file({**load_file(file), **(tensors or {})}, file, stated | metadata)


def test_scores_are_used_again_as_they_were_written_and_not_if_they_are_damaged(tmp_path):
    scores, file = some_scores(), tmp_path / PROGRESS / FILE
    damages = [
        lambda: rewritten(file, losses="[]"),
        lambda: rewritten(file, losses="5"),
        lambda: rewritten(file, sha256=""),
        lambda: rewritten(file, {"layers": torch.rand(2)}),
        lambda: rewritten(file, {"surprise": torch.rand(2)}),
        lambda: file.write_bytes(file.read_bytes()[:-1]),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(bytes([*file.read_bytes()[:-1], file.read_bytes()[-1] ^ 1])),
    ]
    for damage in damages:
        write_progress(tmp_path, "ours", scores, [6.5, 6.75])
        found, losses = earlier_progress(tmp_path, "ours")
        assert losses == [6.5, 6.75] and torch.equal(found.heads[1], scores.heads[1])
        assert earlier_progress(tmp_path, "theirs") is None
        damage()
        assert earlier_progress(tmp_path, "ours") is None

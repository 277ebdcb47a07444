"""Lines of ranks that reach the screen."""

import pytest

from distill_nemo.executors.watch.screen import RankLines

TRACEBACK = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "RuntimeError: gone"]


@pytest.mark.parametrize("marks", ["", "[rank0]: ", "[rank0]: [rank0]: ", "[rank0]:"])
def test_of_a_traceback_only_its_last_line_is_shown_however_often_torch_marks_it(marks):
    lines = ["step 1", *TRACEBACK, "step 2"]
    shown = RankLines(torchrun=True)
    assert [shown.shown(f"[default0]:{marks}{line}") for line in lines] == ["step 1", "", "", TRACEBACK[-1], "step 2"]


def test_an_error_of_a_rank_ends_what_is_shown_of_it():
    shown = RankLines(torchrun=True)
    lines = ["step 1", "error: no such file", "step 2"]
    assert [shown.shown(f"[default0]:{line}") for line in lines] == ["step 1", "", ""]
    assert shown.shown("[default1]:step 2") == "rank 1: step 2"


def test_what_gloo_says_about_its_peers_is_not_shown():
    peers = "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    assert [RankLines(torchrun=True).shown(f"[default{rank}]:{peers}") for rank in (0, 1)] == ["", ""]

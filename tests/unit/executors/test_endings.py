"""Reasons why a task ended, from logs that several nodes write."""

import pytest

from distill_nemo.executors.watch.endings import why_a_log_ended, why_nodes_ended

OF_RANK_8 = """\
[default0]:[rank8]: Traceback (most recent call last):
[default0]:[rank8]: KeyError: 'text'
"""
OF_RANK_0 = """\
[default0]:[rank0]: Traceback (most recent call last):
[default0]:[rank0]: torch.distributed.DistBackendError: NCCL error: remote process exited
"""
ENDED_8 = "  rank      : 8 (local_rank: 0)\n  exitcode  : 1 (pid: 501)\n"
ENDED_0 = "  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 101)\n"
SAID = "error: rank 8 ended with exit code 1: KeyError: 'text'"


@pytest.mark.parametrize("of_ranks", [OF_RANK_8 + OF_RANK_0, OF_RANK_0 + OF_RANK_8])
def test_a_rank_has_its_own_last_words_in_a_log_of_two_nodes(of_ranks):
    assert why_a_log_ended(f"[default0]:step 7/9\n{of_ranks}{ENDED_8}{ENDED_0}") == SAID


def test_words_without_torchs_mark_are_those_of_the_nodes_own_rank():
    log = "[default0]:KeyError: 'text'\n[default1]:ZeroDivisionError: division by zero\n"
    assert why_a_log_ended(log + ENDED_8, first_rank=8) == SAID


def test_a_log_for_each_node():
    assert why_nodes_ended([(0, OF_RANK_0), (8, OF_RANK_8 + ENDED_8)]) == SAID
    assert why_nodes_ended([(0, "[default0]:step 7/9\n"), (8, "[default0]:KeyError: 'text'\n" + ENDED_8)]) == SAID


def test_the_first_rank_that_says_why_is_heard_whole_and_alone():
    reason = "error: step 2: the loss is not finite\n  lower optimizer.lr"
    lines = f"{reason}\nerror on rank 1: step 2: the loss is not finite\n  lower optimizer.lr".splitlines()
    log = "".join(f"[default0]:{line}\n" for line in lines)
    assert why_a_log_ended(log + ENDED_0) == reason

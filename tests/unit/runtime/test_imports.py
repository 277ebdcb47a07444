"""Imports of Megatron without the garbage collector."""

import gc
import sys

import pytest

from distill_nemo.runtime.imports import megatron_imports


def counts():
    """Return the numbers of frozen objects: before the first imports of Megatron, after them, and after later ones."""
    gc.unfreeze()
    megatron = sys.modules.pop("megatron.core")
    found = [gc.get_freeze_count()]
    for _ in range(2):
        with megatron_imports():
            assert not gc.isenabled()
            sys.modules["megatron.core"] = megatron
        assert gc.isenabled()
        found.append(gc.get_freeze_count())
    return found


def test_what_a_process_imports_first_is_frozen_and_nothing_later(one):
    ((before, first, later),) = one.run(counts)
    assert before == 0 and first > 100_000 and later <= first


def test_a_collector_that_is_off_stays_off_and_an_error_turns_it_on_again():
    with pytest.raises(ImportError), megatron_imports():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with megatron_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

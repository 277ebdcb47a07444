"""Agreement of a store with its teacher, from arrays alone."""

import numpy as np
import pytest

from distill_nemo.teacher_store_jobs.agreement import Agreement
from tests.stores import manifest_of, random_window


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_windows_in_which_no_token_counts_agree(codec):
    manifest = manifest_of(codec)
    window = {name: x[:0] for name, x in random_window(manifest, 0).items()}
    agreement = Agreement(manifest)
    draws = {"stored_draws": np.zeros((0, 6)), "expected_draws": np.zeros((0, 6))}
    agreement.add(window | draws, window)
    assert agreement.problem() is None
    assert agreement.summary().startswith("0 tokens asked again")

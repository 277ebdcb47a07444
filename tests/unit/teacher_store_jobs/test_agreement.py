"""Agreement of a store with its teacher, from arrays alone."""

import numpy as np
import pytest
import torch

from distill_nemo.data.samplers import TARGET
from distill_nemo.teacher_store_jobs.agreement import Agreement, encode_and_count
from distill_nemo.teacher_store_jobs.targets import UNIFORM
from distill_nemo.teacher_store_jobs.teacher_run import Chunk
from tests.stores import V, manifest_of, random_window


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_windows_in_which_no_token_counts_agree(codec):
    manifest = manifest_of(codec)
    window = {name: x[:0] for name, x in random_window(manifest, 0).items()}
    agreement = Agreement(manifest)
    asked = {
        "stored_draws": np.zeros((0, 6)),
        "expected_draws": np.zeros((0, 6)),
        "logprobs_of_stored": np.zeros((0, 5)),
    }
    agreement.add(window | asked, window)
    assert agreement.problem() is None
    assert agreement.summary().startswith("0 tokens asked again")


@pytest.mark.parametrize(("shift", "problem"), [(0, None), (1, "logprobs is ")])
def test_ids_that_are_not_the_teachers_are_found_though_all_numbers_are_its_own(shift, problem):
    manifest = manifest_of("top_k", temperature=2.0)
    logits = 40 * torch.randn(6, V, generator=torch.Generator().manual_seed(1))  # some are below what a store can hold
    rows = {"labels": torch.arange(6), UNIFORM: torch.zeros(6, dtype=torch.float64)}

    def ask(ids):
        chunk = Chunk(logits.clone(), torch.zeros(6, 1), rows | {TARGET + "ids": ids}, None, 0)
        return {name: x.numpy() for name, x in encode_and_count(manifest, chunk).items()}

    window = ask(torch.zeros(6, manifest.num, dtype=torch.int32))
    coding = manifest.coding
    stored = window | coding.unpack(coding.pack(window))
    stored["ids"] = (stored["ids"] + shift) % V
    agreement = Agreement(manifest)
    agreement.add(ask(torch.from_numpy(stored["ids"])), stored)
    found = agreement.problem()
    assert found is None if problem is None else found.startswith(problem)

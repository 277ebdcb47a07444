"""Sizes of shards: neither too many files, nor too much to repeat."""

from dataclasses import replace

import pytest

from distill_nemo.teacher_store.manifest import SHARD_BYTES
from distill_nemo.teacher_store_jobs.manifest import windows_per_shard
from tests.stores import manifest_of


@pytest.mark.parametrize("codec", ["sampled", "top_k"])
@pytest.mark.parametrize(("tokens", "at_most"), [(10**6, 4), (10**9, 4096), (10**10, 4200), (10**11, 35_000)])
def test_shards_are_few_and_small(codec, tokens, at_most):
    num = {"sampled": 50, "top_k": 12}[codec]
    manifest = manifest_of(codec, num=num, vocab_size=151_936, sequence_length=4096, num_windows=tokens // 4096)
    manifest = replace(manifest, windows_per_shard=windows_per_shard(manifest))
    assert manifest.num_shards <= at_most
    assert manifest.windows_per_shard * 4096 * manifest.coding.usual_bytes <= SHARD_BYTES


def test_a_window_that_is_larger_than_a_shard_should_be_has_one_of_its_own():
    assert windows_per_shard(manifest_of("hidden", num=16_384, sequence_length=2**17)) == 1

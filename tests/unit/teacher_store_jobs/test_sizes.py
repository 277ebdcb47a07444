"""Sizes of shards: neither too many files, nor too much to repeat."""

from dataclasses import replace

import pytest

from distill_nemo.teacher_store import shards
from distill_nemo.teacher_store.manifest import SHARD_BYTES, ShardFacts
from distill_nemo.teacher_store_jobs.manifest import windows_per_shard
from tests.stores import manifest_of


@pytest.mark.parametrize("codec", ["sampled", "top_k"])
@pytest.mark.parametrize(("tokens", "at_most"), [(10**6, 4), (10**9, 4096), (10**10, 4200), (10**11, 35_000)])
def test_shards_are_few_and_small(codec, tokens, at_most):
    num = {"sampled": 50, "top_k": 12}[codec]
    manifest = manifest_of(codec, num=num, vocab_size=151_936, sequence_length=4096, num_windows=tokens // 4096)
    manifest = replace(manifest, windows_per_shard=windows_per_shard(manifest))
    assert manifest.num_shards <= at_most
    windows = manifest.windows_per_shard
    pairs = round(windows * 4096 * 2.5 * 50**0.5)  # as usual text has
    size = shards.shard_size(manifest, 0, ShardFacts("", windows * 4096, pairs))
    assert size <= 1.001 * SHARD_BYTES and (tokens < 10**11 or size > 0.95 * SHARD_BYTES)


def test_a_window_that_is_larger_than_a_shard_should_be_has_one_of_its_own():
    assert windows_per_shard(manifest_of("hidden", num=16_384, sequence_length=2**17)) == 1

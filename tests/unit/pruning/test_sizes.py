"""Sizes that can be had, candidates for a target, and choices among equal scores."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from distill_nemo.checks import check_prune
from distill_nemo.config import ParallelismConfig, PruneConfig, StudentConfig
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.resolve import resolve
from distill_nemo.pruning.choice import highest
from distill_nemo.pruning.search import candidates, target_parameters
from distill_nemo.pruning.sizes import complete, evenly_spaced, sizes_of, smaller

QWEN3_8B = StudentConfig(
    family="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
)
QWEN3_30B = StudentConfig(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151936,
    num_experts=128,
    num_experts_per_tok=8,
    moe_ffn_hidden_size=768,
)
NEMOTRON = replace(
    QWEN3_8B, family="nemotron_h", num_layers=4, family_fields={"hybrid_override_pattern": "M-M*", "n_groups": 8}
)
DENSE_LAYERS = {"mlp_only_layers": [0, 5], "decoder_sparse_step": 1}
CONFIG = PruneConfig("m", "out", "data")


def test_of_equal_scores_the_first_stay():
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3) == [1, 2, 3]
    assert highest(torch.zeros(5), 2) == [0, 1]


def test_groups_keep_their_heads_unless_heads_are_given():
    model = resolve(QWEN3_8B)
    assert complete(model, {"num_query_groups": 6})["num_attention_heads"] == 24
    sizes = complete(model, {"num_attention_heads": 24})
    assert (sizes["num_query_groups"], sizes["num_attention_heads"]) == (8, 24)


@pytest.mark.parametrize(
    ("model", "given", "reason"),
    [
        (
            QWEN3_8B,
            {"num_attention_heads": 32, "num_query_groups": 4},
            "num_query_groups times 1 to 4: heads stay in",
        ),
        (QWEN3_8B, {"num_attention_heads": 20}, "num_attention_heads = 20 with num_query_groups = 8 is not possible"),
        (QWEN3_8B, {"hidden_size": 5000}, "hidden_size          1 to 4096"),
        (QWEN3_8B, {"num_layers": 37}, "num_layers           1 to 36"),
        (QWEN3_8B, {"num_experts": 4}, "num_experts = 4: m has none"),
        (QWEN3_8B, {"mamba_num_heads": 4}, "mamba_num_heads = 4: m has none"),
        (QWEN3_30B, {"num_experts": 4}, "num_experts          8 (of a token) to 128"),
        (QWEN3_30B, {"ffn_hidden_size": 64}, "moe_ffn_hidden_size cuts them"),
        (NEMOTRON, {"mamba_num_heads": 60}, "mamba_num_heads      1 to 128, a multiple of its 8 groups"),
    ],
)
def test_impossible_sizes_are_refused_with_those_that_are_possible(model, given, reason):
    with pytest.raises(ValueError, match="m can be cut to:\n  num_layers") as error:
        complete(replace(resolve(model), name="m"), given)
    assert reason in str(error.value)


def candidates_of(model, layers_of=None, tensor=1, expert=1, **stated):
    parallelism = ParallelismConfig(tensor_model_parallel_size=tensor, expert_model_parallel_size=expert)
    return candidates(model, replace(CONFIG, **stated), parallelism, layers_of or partial(evenly_spaced, model))


@pytest.mark.parametrize(("model", "target", "ranks"), [(QWEN3_8B, 6e9, 1), (QWEN3_8B, 4e9, 2), (QWEN3_30B, 16e9, 1)])
def test_candidates_meet_the_target_in_sizes_that_ranks_divide(model, target, ranks):
    model = resolve(model)
    found = candidates_of(model, tensor=ranks, target_params=target)
    assert 2 <= len(found) <= 24
    width = "moe_ffn_hidden_size" if model.experts else "ffn_hidden_size"
    for sizes in found:
        count = num_parameters(smaller(model, sizes, evenly_spaced(model, sizes["num_layers"])))
        assert 0.9 * target <= count <= target, sizes
        assert sizes["hidden_size"] % 64 == 0 and sizes[width] % (64 * ranks) == 0, sizes
        assert sizes["num_query_groups"] % ranks == 0, sizes


def test_candidates_have_the_layout():
    found = candidates_of(resolve(QWEN3_30B), expert=64, target_params=16e9)
    assert {sizes["num_experts"] for sizes in found} <= {64, 128}


def test_a_target_counts_the_layers_that_stay():
    model = resolve(replace(QWEN3_30B, num_layers=8, ffn_hidden_size=6144, family_fields=DENSE_LAYERS))

    def without_dense_layers_first(count):
        return sorted([1, 2, 3, 4, 6, 7, 0, 5][:count])

    for layers_of in (without_dense_layers_first, partial(evenly_spaced, model)):
        found = candidates_of(model, layers_of, target_params=2e9)
        counts = [num_parameters(smaller(model, sizes, layers_of(sizes["num_layers"]))) for sizes in found]
        assert counts and all(1.8e9 <= count <= 2e9 for count in counts)
        assert {sizes["num_layers"] for sizes in found} != {8}


def test_widths_of_experts_and_of_dense_layers_are_cut_alike():
    model = resolve(replace(QWEN3_30B, num_layers=8, ffn_hidden_size=6144, family_fields=DENSE_LAYERS))
    own = {"num_layers": 8, "hidden_size": 2048, "num_experts": 128, "num_query_groups": 4}
    (sizes,) = candidates_of(model, target_params=4e9, **own)
    assert sizes["moe_ffn_hidden_size"] < 768
    assert sizes["ffn_hidden_size"] / 6144 == pytest.approx(sizes["moe_ffn_hidden_size"] / 768, abs=64 / 768)


def test_sizes_that_are_stated_beside_a_target_stay():
    found = candidates_of(resolve(QWEN3_8B), num_layers=36, hidden_size=3072, target_params=6e9)
    assert {(sizes["num_layers"], sizes["hidden_size"]) for sizes in found} == {(36, 3072)}


def targets_in(text):
    return [float(number) for number in re.findall(r"target_\w+=([\d.]+)", text.split("closest")[-1])]


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"target_params": 5e8}, "target_params=500000000: no cut of m has about so few"),
        ({"target_params": 7e9, "num_layers": 36, "hidden_size": 2048}, "target_params=7000000000: no cut of m"),
        ({"target_memory": 0.01, "target_gpu": "h100"}, r"target_memory=0.01 \(400,000,000 parameters\): no cut of m"),
        ({"target_params": 9e9}, "cuts nothing: m has 8,190,735,360 parameters. State less than target_params=8190"),
        (
            {"target_memory": 0.9, "target_gpu": "h200"},
            r"cuts nothing: m has [\d,]+ parameters. State less than .*=0.1161 ",
        ),
    ],
)
def test_targets_out_of_reach_are_refused_with_those_that_would_do(stated, reason):
    model = replace(resolve(QWEN3_8B), name="m")
    with pytest.raises(ValueError, match=reason) as error:
        candidates_of(model, **stated)
    if "closest" in str(error.value):
        assert targets_in(str(error.value))
        for target in targets_in(str(error.value)):
            assert candidates_of(
                model, **stated | {("target_memory" if "target_memory" in stated else "target_params"): target}
            )


def test_a_share_of_a_gpus_memory_is_a_number_of_parameters():
    assert target_parameters(replace(CONFIG, target_gpu="h100", target_memory=0.15)) == 6 * 10**9
    assert target_parameters(replace(CONFIG, target_gpu="h100", target_memory=0.15, target_dtype="fp8")) == 12 * 10**9


@pytest.mark.parametrize(
    ("changes", "ranks", "reason"),
    [
        ({}, 1, "nothing says how small"),
        ({"target_params": 1e9, "target_memory": 0.5, "target_gpu": "h100"}, 1, "state one of them"),
        ({"target_memory": 0.5}, 1, "need each other"),
        ({"num_layers": 2, "target_gpu": "h100"}, 1, "need each other"),
        ({"num_layers": 2, "target_dtype": "fp8"}, 1, "target_dtype = fp8 .* leave it out"),
        ({"num_layers": 2, "samples": 5}, 2, "samples = 5 is not divisible by the 2 data-parallel ranks"),
        ({"num_layers": 2, "parallelism": ParallelismConfig(context_parallel_size=2)}, 2, "scored whole"),
        ({"num_layers": 2, "parallelism": ParallelismConfig(tensor_model_parallel_size=4)}, 2, "world size 2"),
    ],
)
def test_a_config_that_says_too_little_or_too_much_is_refused(changes, ranks, reason):
    with pytest.raises(ValueError, match=reason):
        check_prune(replace(CONFIG, **changes), ranks)


def test_layers_that_a_rule_states_are_listed_anew():
    model = resolve(replace(QWEN3_30B, num_layers=8, ffn_hidden_size=6144, family_fields=DENSE_LAYERS))
    cut = smaller(model, sizes_of(model) | {"num_layers": 4}, [1, 4, 5, 7])
    assert cut.family_fields["mlp_only_layers"] == [2]
    assert [layer.has_experts for layer in cut.layers] == [True, True, False, True]

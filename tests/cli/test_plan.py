"""`nemo distill plan`: output, refusals, and exit code."""

import re

import pytest

from tests.cli.command import nemo_here
from tests.hub_downloads import Hub, asked

PLAN = ("plan", "--factory", "llama32_3b_to_1b")
TWO = ("parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true")
SLURM = ("run.executor=slurm", "run.executor.nodes=2", "run.executor.devices=8")
TINY = ("num_layers=2", "hidden_size=32", "ffn_hidden_size=64", "num_attention_heads=4", "vocab_size=507")
PAIR = [f"{role}.{word}" for role in ("student", "teacher") for word in ("checkpoint=None", *TINY)]
HUGE = [
    word.replace("=2", "=96").replace("=32", "=16384").replace("=64", "=65536").replace("=4", "=128") for word in PAIR
]


def test_a_plan_of_checkpoints_without_data_on_one_screen(capfd, inputs):
    checkpoints = [f"{role}.checkpoint={inputs / role}" for role in ("student", "teacher")]
    arguments = [*checkpoints, *SLURM, *TWO, "data.sequence_length=64", "gpu=a100-80gb", "utilisation=0.5"]
    plan = nemo_here(capfd, *PLAN, *arguments)
    assert (plan.code, plan.err) == (0, "")
    lines = plan.out.splitlines()
    assert lines[0] == "llama32_3b_to_1b on 16 x A100 80 GB (80 GB, 312 TFLOPS)"
    assert lines[1] == "  tensor 2 x data 8, sequence parallel, bf16, Transformer Engine"
    rows = dict(re.findall(r"^  ([\w' -]+?)  +([\d.,]+)", plan.out, re.M))
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k and v, output, MLP, norms
    assert rows["student"] == f"{2 * layer + 2 * 512 * 32 + 32:,}"
    assert {"teacher", "weights", "gradients", "optimizer", "activations", "total", "hours", "GPU-hours"} <= rows.keys()
    assert "fits, " in plan.out and "if GPUs reach 0.5 of their peak" in plan.out
    assert re.search(r"^  \(?the loss +\d.*, logits of [\d,]+ tokens at a time", plan.out, re.M)
    assert len(lines) <= 40 and max(map(len, lines)) <= 120


def test_a_recipe_may_be_named_by_the_first_word(capfd):
    assert nemo_here(capfd, PLAN[0], PLAN[2], *PAIR) == nemo_here(capfd, *PLAN, *PAIR)


def test_what_does_not_fit_exits_1_and_says_what_would(capfd):
    plan = nemo_here(capfd, *PLAN, *HUGE, *SLURM)
    assert plan.code == 1
    assert "does not fit, " in plan.out
    assert re.fullmatch(r"error: does not fit: [\d.]+ GB too much on a H100 of 80 GB; .+\n", plan.err)


def test_a_layout_is_chosen_for_a_number_of_gpus_after_all_overrides(capfd):
    small = nemo_here(capfd, "plan", "distil", *PAIR, "gpus=16", "gpu=h200")
    assert (small.code, small.err) == (0, "")
    assert small.out.startswith("layout for 16 x H200: data 16; micro batch ")
    assert "\ndistil on 16 x H200 (141 GB, 989 TFLOPS)\n  data 16, bf16" in small.out
    large = nemo_here(capfd, "plan", "distil", *HUGE, "gpus=256", "training.recompute=full", "training.dtype=bfloat16")
    assert (large.code, large.err) == (0, "")
    assert re.search(r"^layout for 256 x H100: tensor 8 x pipeline .*recompute full", large.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=0"], "gpus must be at least 1, got 0"),
        (["gpus=many"], "gpus must be int | None, got 'many'"),
        (["gpus=8"], "gpus = 8, but run.executor.* starts 16 ranks"),
        (["gpus=16", "gpu=h10"], 'gpu = "h10" is not known. Did you mean h100'),
        (["gpu=h10"], 'gpu = "h10" is not known. Did you mean h100'),
        (["gpuu=h100"], 'unknown field "gpuu". Did you mean gpu or gpus? See `nemo distill plan --help`'),
        (
            ["distillation.temprature=2"],
            'unknown field "distillation.temprature". Did you mean distillation.temperature',
        ),
        (["utilisation=1.5"], "utilisation must be above 0 and at most 1, got 1.5"),
        (["run.executor.processes=3"], "world size 3 is not divisible by"),
        (["teacher.vocab_size=600"], "student and teacher must share a vocabulary"),
        (["teacher.ffn_hidden_size=33"], "is not divisible by parallelism.tensor_model_parallel_size = 2"),
        (
            ["teacher.checkpoint=/no/such"],
            "checkpoint directory not found: /no/such. A plan reads its config.json only",
        ),
    ],
)
def test_what_is_refused_is_one_error(capfd, arguments, message):
    executor = [] if arguments[0].startswith(("run.", "gpus=16")) else SLURM
    plan = nemo_here(capfd, *PLAN, *PAIR, *TWO, *executor, *arguments)
    assert (plan.code, plan.out) == (1, "")
    assert plan.err.startswith("error: ") and message in plan.err and len(plan.err.splitlines()) == 1, plan.err


def test_data_with_ids_that_the_model_lacks_is_refused_as_by_the_run(capfd, inputs):
    smaller = ["student.vocab_size=300", "teacher.vocab_size=300", f'data.train=["{inputs}/train"]']
    plan = nemo_here(capfd, *PLAN, *PAIR, *smaller)
    assert (plan.code, plan.out) == (1, "") and "train.bin holds the token id 5" in plan.err
    assert "but the model's vocab_size is 300" in plan.err and len(plan.err.splitlines()) == 1


def test_a_plan_of_models_on_the_hub_downloads_no_weights(capfd, inputs, tmp_path):
    distil, roles = ("plan", "distil", "data.sequence_length=64"), ("teacher", "student")
    local = nemo_here(capfd, *distil, *(f"{role}.checkpoint={inputs / role}" for role in roles))
    with Hub() as hub, asked(hub.url, tmp_path):
        commits = [hub.commit(f"org/{role}", inputs / role) for role in roles]
        named = (f"teacher.checkpoint=org/teacher@{commits[0]}", "student.checkpoint=org/student")
        chosen = nemo_here(capfd, *distil, *named, "gpus=8")
        assert (nemo_here(capfd, *distil, *named), local.code, chosen.code) == (local, 0, 0)
        assert hub.served.keys() == {"config.json", "generation_config.json"} and hub.strange == []
        unknown = nemo_here(capfd, *distil, named[0], "student.checkpoint=org/studnet")
        assert unknown.err.startswith("error: student.checkpoint: org/studnet: there is no such directory here, and")

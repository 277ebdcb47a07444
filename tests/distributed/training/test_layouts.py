"""Whole runs at every layout agree over ten steps, and a run may change its layout on the way.

Legend: DP, TP, PP, VPP, CP, EP the data, tensor, pipeline, virtual pipeline, context and expert parallel sizes; SP
sequence parallelism.
"""

import os
from itertools import product

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.spawn import Gloo
from tests.training import changed, differences, metrics, tiny_run, write_deep_models

# Sums run in another order, so the last of 7 digits differ, and Adam amplifies that. Measured over all of these runs:
# losses and evaluations 3.8e-7 at most, the gradient norm 3.1e-6.
TOLERANCE = 1e-5

LAYOUTS = {  # processes, parallel sizes
    "one": (1, {}),
    "DP=2": (2, {}),
    "DP=4": (4, {}),
    "TP=2, SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
    "PP=2": (2, {"pipeline_model_parallel_size": 2}),
    "TP=4": (4, {"tensor_model_parallel_size": 4}),
    "PP=4": (4, {"pipeline_model_parallel_size": 4}),
    "PP=4, VPP=2": (4, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}),
    "CP=2": (2, {"context_parallel_size": 2}),
    "TP=2, PP=2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP=2, CP=2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "TP=2, PP=2, DP=2": (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP=2": (2, {"expert_model_parallel_size": 2}),
}
TEN_STEPS = [layout for layout in LAYOUTS if layout not in ("one", "EP=2")]  # EP=2 has a test of its own
ALWAYS = (("static", "TP=2, PP=2, DP=2"), ("dynamic", "PP=4, VPP=2"), ("dynamic", "TP=2, CP=2"))
HIDDEN = {  # of different widths, hence with projections
    "distillation.hidden_loss": "mse",
    "distillation.hidden_layers": ["decoder.layers.0:decoder.layers.0", "decoder.layers.6:decoder.layers.6"],
}
STATIC = {**HIDDEN, "distillation.hidden_weight": 0.3, "distillation.lm_weight": 0.2}
DYNAMIC = {
    **HIDDEN,
    "distillation.balancer": "dynamic",
    "distillation.skip_lm_loss": False,
    "optimizer.use_distributed_optimizer": False,
}
CHANGES = {
    "static": STATIC,
    "dynamic": DYNAMIC,
    "moe": {"student.checkpoint": "moe_student", "teacher.checkpoint": "moe_teacher"},
    "quantised": {"quantization.format": "nvfp4", "quantization.calibration_samples": 8},
    "long": {**STATIC, "training.steps": 12, "training.eval_interval": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("deep")
    write_deep_models(root)
    return root


@pytest.fixture(scope="module")
def eight():
    """Return eight processes. Smaller runs leave some of them idle."""
    with Gloo(8, init=False, timeout=590) as group:
        yield group


@pytest.fixture(scope="module")
def expected(inputs, models, eight, tmp_path_factory):
    """Return {name of the changes: metrics of the uninterrupted run on one process}."""
    root, known = tmp_path_factory.mktemp("one"), {}

    def found(name):
        if name not in known:
            eight.run(train, inputs, models, root / name, "one", CHANGES[name])
            known[name] = metrics(root / name)
        return known[name]

    return found


def train(inputs, models, output, layout, changes):
    """Run on the ranks that the layout needs."""
    from distill_nemo.training.entry import run_config

    processes, sizes = LAYOUTS[layout]
    if int(os.environ["RANK"]) >= processes:
        return
    # Pipelines and copies of the model need four micro batches. Elsewhere two suffice, as collectives take the time.
    micro_batch = 1 if processes == 1 or "PP" in layout or "DP" in layout or "EP" in layout else 2
    run = tiny_run(inputs, output, steps=10, micro_batch_size=micro_batch, global_batch_size=4, eval_interval=5)
    run.data.sequence_length = 16
    run.optimizer.decay_steps = 12
    run.checkpoint.save_interval = 100
    models_of = {"student.checkpoint": "student", "teacher.checkpoint": "teacher"}
    changed(run, {name: str(models / model) for name, model in models_of.items()})
    changed(run, {name: str(models / value) if name in models_of else value for name, value in changes.items()})
    changed(run, {f"parallelism.{name}": size for name, size in sizes.items()})
    everyone, os.environ["WORLD_SIZE"] = os.environ["WORLD_SIZE"], str(processes)
    try:
        run_config(run)
    finally:
        os.environ["WORLD_SIZE"] = everyone


def assert_the_same(found, expected, tolerance=TOLERANCE):
    """Print the worst difference of each metric (`pytest -rP` shows it), then compare."""
    worst = differences(found, expected)
    print({name: f"{value:.1e}" for name, value in sorted(worst.items()) if value})
    assert max(worst.values()) <= tolerance, worst


@pytest.mark.parametrize(
    ("loss", "layout"),
    [
        pytest.param(*each, marks=[] if each in ALWAYS else pytest.mark.long)
        for each in product(("static", "dynamic"), TEN_STEPS)
    ],
)
def test_ten_steps_agree_at_every_layout(inputs, models, eight, expected, tmp_path, loss, layout):
    eight.run(train, inputs, models, tmp_path, layout, CHANGES[loss])
    assert_the_same(metrics(tmp_path), expected(loss))


def test_a_dynamic_balancer_weighs_by_the_means_of_the_step_before(expected):
    """The formula is that of docs/semantics.md, on reported losses. The first step uses its own means."""
    steps = [line for line in expected("dynamic") if line["kind"] == "train"]
    for before, now in zip([steps[0], *steps], steps, strict=False):
        lm, logits, hidden = (before[name] for name in ("lm_loss", "logit_loss", "hidden_loss"))
        share = min(logits / hidden, 10.0)
        scale = min(lm / (logits + share * hidden), 10.0)
        total = now["lm_loss"] + scale * (now["logit_loss"] + share * now["hidden_loss"])
        assert now["kd_loss"] == pytest.approx(total, rel=1e-6)


def test_ten_steps_stay_together_whoever_holds_the_optimizer(inputs, models, eight, expected, tmp_path):
    """The plain optimizer has the static loss, the distributed one the dynamic loss: the reverse of the test above."""
    for loss, distributed in (("static", False), ("dynamic", True)):
        changes = {**CHANGES[loss], "optimizer.use_distributed_optimizer": distributed}
        eight.run(train, inputs, models, tmp_path / loss, "DP=2", changes)
        assert_the_same(metrics(tmp_path / loss), expected(loss))


@pytest.mark.parametrize("distributed", [True, False])
def test_ten_steps_of_experts_stay_together(inputs, models, eight, expected, tmp_path, distributed):
    changes = {**CHANGES["moe"], "optimizer.use_distributed_optimizer": distributed}
    eight.run(train, inputs, models, tmp_path, "EP=2", changes)
    assert_the_same(metrics(tmp_path), expected("moe"))


@pytest.mark.long
def test_ten_steps_of_a_quantised_student_stay_together_on_a_virtual_pipeline(
    inputs, models, eight, expected, tmp_path
):
    eight.run(train, inputs, models, tmp_path, "PP=4, VPP=2", CHANGES["quantised"])
    assert_the_same(metrics(tmp_path), expected("quantised"))


def test_a_run_goes_on_at_one_layout_after_another(inputs, models, eight, expected, tmp_path):
    """Each layout trains two steps. Optimizer state and projections keep their names on every stage."""
    for i, layout in enumerate(("TP=2", "PP=2", "DP=4", "PP=4, VPP=2", "CP=2", "one")):
        changes = {**CHANGES["long"], "training.steps": 2 * (i + 1)}
        eight.run(train, inputs, models, tmp_path, layout, changes)
        assert projections(tmp_path, step=2 * (i + 1)) == {
            f"{kind}model._loss_modules.{number}.projection.weight"
            for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param.")
            for number in (0, 1)
        }
    assert_the_same(metrics(tmp_path), expected("long"))


def projections(output, step):
    """Return the keys of projection parameters in a checkpoint."""
    keys = FileSystemReader(output / "checkpoints" / f"step_{step:08d}").read_metadata().state_dict_metadata
    return {key for key in keys if "projection" in key}


def test_experts_go_on_in_one_process(inputs, models, eight, expected, tmp_path):
    for layout, steps in (("EP=2", 5), ("one", 10)):
        eight.run(train, inputs, models, tmp_path, layout, {**CHANGES["moe"], "training.steps": steps})
    assert_the_same(metrics(tmp_path), expected("moe"))

"""A resumed run equals an uninterrupted one bit for bit and, at another layout, within rounding."""

import contextlib
import io
import os
import signal
import threading
import time

import pytest

from tests.tiny_models import write_hf
from tests.training import changed, metrics, tiny_run


def train(inputs, output, tensor, pipeline=1, stop_at=None, changes=None):
    """Run once on this rank. SIGTERM reaches rank 0 when the metrics reach step `stop_at`."""
    from distill_nemo.training.entry import run_config

    run = changed(tiny_run(inputs, output), changes or {})
    run.parallelism.tensor_model_parallel_size = tensor
    run.parallelism.pipeline_model_parallel_size = pipeline
    if stop_at is not None and os.environ.get("RANK", "0") == "0":
        threading.Thread(target=_terminate_at, args=(output, stop_at), daemon=True).start()
    try:
        run_config(run)
    except SystemExit as stopped:
        return stopped.code
    return 0


def _terminate_at(output, step):
    while True:
        try:
            if metrics(output)[-1]["step"] >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.005)


LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 2, 1), "dp2": (2, 1, 1), "pp2": (2, 1, 2)}  # processes, tensor, pipeline


@pytest.fixture(scope="module")
def whole(inputs, one, two, tmp_path_factory):
    """Return {layout: metrics of an uninterrupted run}."""
    root = tmp_path_factory.mktemp("whole")
    for layout, (processes, *sizes) in LAYOUTS.items():
        assert (one, two)[processes - 1].run(train, inputs, root / layout, *sizes) == [0] * processes
    return {layout: metrics(root / layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_equals_uninterrupted_bit_for_bit(inputs, one, two, whole, tmp_path, layout):
    parts = tmp_path / "parts"
    processes, *sizes = LAYOUTS[layout]
    group = (one, two)[processes - 1]
    assert group.run(train, inputs, parts, *sizes, 2) == [128 + signal.SIGTERM] * processes
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert group.run(train, inputs, parts, *sizes) == [0] * processes
    assert metrics(parts) == whole[layout]


DYNAMIC = {
    "distillation.balancer": "dynamic",
    "distillation.skip_lm_loss": False,
    "distillation.hidden_loss": "cosine",
    "distillation.hidden_layers": ["decoder.layers.0:decoder.layers.1"],  # on the first stage
    "distillation.schedules": {"kd_loss_scale": "linear 1:2 8:0.5", "temperature": "cosine 2:4 7:1"},
}


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_dynamic_balancer_weighs_on_as_it_did(inputs, one, two, tmp_path, layout):
    """The weights come from the saved means of the previous step and the number of the step. They agree bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    processes, *sizes = LAYOUTS[layout]
    group = (one, two)[processes - 1]
    assert group.run(train, inputs, whole, *sizes, None, DYNAMIC) == [0] * processes
    assert group.run(train, inputs, parts, *sizes, 2, DYNAMIC) == [128 + signal.SIGTERM] * processes
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert group.run(train, inputs, parts, *sizes, None, DYNAMIC) == [0] * processes
    assert metrics(parts) == metrics(whole)


def test_every_layout_gives_the_same_curve_and_reshards(inputs, one, two, whole, tmp_path):
    two.run(train, inputs, tmp_path, 2, 1, 2)
    one.run(train, inputs, tmp_path, 1)
    runs = whole | {"tp2_then_one": metrics(tmp_path)}
    for layout, lines in runs.items():
        assert len(lines) == len(whole["one"]), layout
        for line, expected in zip(lines, whole["one"], strict=True):
            assert line["kind"] == expected["kind"]
            one_run, other = ({name: x for name, x in each.items() if name != "kind"} for each in (expected, line))
            assert other == pytest.approx(one_run, rel=1e-4, abs=1e-6), layout


@pytest.mark.parametrize("family", ["nemotron_h", "deepseek_v3"])
@pytest.mark.parametrize("distributed", [True, False])
def test_tensors_of_other_mixers_reshard(inputs, one, two, tmp_path, family, distributed):
    """Rows go to every rank from several places, or all of them: weights, master weights and moments alike."""
    student = write_hf(tmp_path / "student", family, seed=2, layers=2, width=32)
    changes = {"student.checkpoint": student, "optimizer.use_distributed_optimizer": distributed}
    one.run(train, inputs, tmp_path / "one", 1, 1, None, changes)
    half = {"training.steps": 4, "optimizer.decay_steps": 8, "parallelism.sequence_parallel": family == "deepseek_v3"}
    two.run(train, inputs, tmp_path / "two", 2, 1, None, changes | half)  # Megatron splits experts with it only
    one.run(train, inputs, tmp_path / "two", 1, 1, None, changes | {"optimizer.decay_steps": 8})
    for line, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


OTHER_OPTIMIZER = {
    "optimizer.lr": 1e-3,
    "optimizer.min_lr": 1e-4,
    "optimizer.warmup_steps": 3,
    "optimizer.decay_style": "linear",
    "optimizer.weight_decay": 0.5,
    "optimizer.adam_beta2": 0.5,
    "optimizer.adam_eps": 1e-3,
}


@pytest.mark.parametrize("distributed", [True, False])
def test_another_learning_rate_counts_from_the_checkpoint_on(inputs, one, tmp_path, distributed):
    """After a loss that is not finite, the error advises a lower one. Moments stay; Adam is the fused one."""
    first = {"training.steps": 4, "optimizer.use_distributed_optimizer": distributed, "training.eval_interval": 100}
    then = {**first, **OTHER_OPTIMIZER, "training.steps": 8}
    one.run(train, inputs, tmp_path / "before", 1, 1, None, {**first, "training.steps": 8, "optimizer.decay_steps": 4})
    one.run(train, inputs, tmp_path / "after", 1, 1, None, then)
    one.run(_with_unfused_adam, inputs, tmp_path / "run", first)
    printed, groups, moments = one.run(_resumed, inputs, tmp_path / "run", then)[0]
    rates = {name: [line["lr"] for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in RUNS}
    assert rates["run"] == rates["before"][:4] + rates["after"][4:]
    assert set(groups) == {(decay, (0.9, 0.5), 1e-3, True) for decay in (0.5, 0.0)} and moments > 0
    assert "optimizer.lr: was 0.01, is 0.001\n" in printed
    assert "training.steps: was 4, is 8, to where the learning rate decays\n" in printed


RUNS = ("before", "after", "run")


def _with_unfused_adam(inputs, output, changes):
    """Train as before Adam was fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill_nemo.training.setup._fuse", lambda adam: None)
        train(inputs, output, 1, changes=changes)


def _resumed(inputs, output, changes):
    """Return a run's output, its optimizer's settings before the first step, and the norm of Adam's first moments."""
    from distill_nemo.training.loop import Loop

    found, begin = [], Loop.run

    def look(loop):
        optimizer = loop.train_state.optimizer
        names = ("weight_decay", "betas", "eps", "fused")
        found.append([tuple(group[name] for name in names) for group in optimizer.param_groups])
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        found.append(sum(float(x["exp_avg"].norm()) for part in parts for x in part.optimizer.state.values()))
        return begin(loop)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(Loop, "run", look)
        train(inputs, output, 1, changes=changes)
    return printed.getvalue(), *found


@pytest.mark.parametrize(
    ("changes", "printed"),
    [
        ({"distillation.temperature": 2.0}, "distillation.temperature: was 1.0, is 2.0"),
        ({"optimizer.use_distributed_optimizer": False}, "optimizer.use_distributed_optimizer: was True, is False"),
    ],
)
def test_another_loss_or_way_of_saving_is_another_run(inputs, one, tmp_path, changes, printed):
    few = {"training.steps": 4, "optimizer.decay_steps": 8}
    one.run(train, inputs, tmp_path, 1, 1, None, few)
    before = metrics(tmp_path)
    with pytest.raises(ValueError, match=printed):
        one.run(train, inputs, tmp_path, 1, 1, None, {**few, "training.steps": 8, **changes})
    assert metrics(tmp_path) == before
    one.run(train, inputs, tmp_path, 1, 1, None, {**few, "training.steps": 8, "distillation.fused_linear": False})
    assert metrics(tmp_path)[-1]["step"] == 8

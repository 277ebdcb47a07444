"""Interrupted and resumed equals uninterrupted, bit for bit; and at another layout, within rounding."""

import os
import signal
import threading
import time

import pytest

from tests.training import changed, metrics, tiny_run


def train(inputs, output, tensor, pipeline=1, stop_at=None, changes=None):
    """One run on this rank; SIGTERM comes to rank 0 when the metrics reach step `stop_at`."""
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_equals_uninterrupted_bit_for_bit(inputs, one, two, tmp_path, layout):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    processes, *sizes = LAYOUTS[layout]
    group = (one, two)[processes - 1]
    assert group.run(train, inputs, whole, *sizes) == [0] * processes
    assert group.run(train, inputs, parts, *sizes, 2) == [128 + signal.SIGTERM] * processes
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert group.run(train, inputs, parts, *sizes) == [0] * processes
    assert metrics(parts) == metrics(whole)


DYNAMIC = {
    "distillation.balancer": "dynamic",
    "distillation.skip_lm_loss": False,
    "distillation.hidden_loss": "cosine",
    "distillation.hidden_layers": ["decoder.layers.0:decoder.layers.1"],  # of the first stage
}


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_dynamic_balancer_weighs_on_as_it_did(inputs, one, two, tmp_path, layout):
    """Its weights come from the means of the step before, which are in the checkpoint: bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    processes, *sizes = LAYOUTS[layout]
    group = (one, two)[processes - 1]
    assert group.run(train, inputs, whole, *sizes, None, DYNAMIC) == [0] * processes
    assert group.run(train, inputs, parts, *sizes, 2, DYNAMIC) == [128 + signal.SIGTERM] * processes
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert group.run(train, inputs, parts, *sizes, None, DYNAMIC) == [0] * processes
    assert metrics(parts) == metrics(whole)


def test_every_layout_gives_the_same_curve_and_reshards(inputs, one, two, tmp_path):
    runs = {}
    for layout, (processes, *sizes) in LAYOUTS.items():
        (one, two)[processes - 1].run(train, inputs, tmp_path / layout, *sizes)
        runs[layout] = metrics(tmp_path / layout)
    two.run(train, inputs, tmp_path / "tp2_then_one", 2, 1, 2)
    one.run(train, inputs, tmp_path / "tp2_then_one", 1)
    runs["tp2_then_one"] = metrics(tmp_path / "tp2_then_one")
    reference = runs.pop("one")
    for layout, lines in runs.items():
        assert len(lines) == len(reference), layout
        for line, expected in zip(lines, reference, strict=True):
            assert line.pop("kind") == expected["kind"]
            numbers = {name: value for name, value in expected.items() if name != "kind"}
            assert line == pytest.approx(numbers, rel=1e-4, abs=1e-6), layout

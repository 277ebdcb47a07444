"""Interrupted and resumed equals uninterrupted, bit for bit; and at another layout, within rounding."""

import os
import signal
import threading
import time

import pytest

from tests.spawn import Gloo
from tests.training import metrics, tiny_run, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def two():
    with Gloo(2, init=False, timeout=300) as group:
        yield group


def train(inputs, output, tensor, pipeline=1, stop_at=None):
    """One run on this rank; SIGTERM comes to rank 0 when the metrics reach step `stop_at`."""
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output)
    run.parallelism.tensor_model_parallel_size = tensor
    run.parallelism.pipeline_model_parallel_size = pipeline
    run.student.max_position_embeddings = 128
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


LAYOUTS = {"tp2": (2, 1), "dp2": (1, 1), "pp2": (1, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_equals_uninterrupted_bit_for_bit(inputs, two, tmp_path, layout):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert two.run(train, inputs, whole, *LAYOUTS[layout]) == [0, 0]
    assert two.run(train, inputs, parts, *LAYOUTS[layout], 2) == [128 + signal.SIGTERM] * 2
    assert metrics(parts)[-1]["step"] < 8, "the signal came too late to show anything"
    assert two.run(train, inputs, parts, *LAYOUTS[layout]) == [0, 0]
    assert metrics(parts) == metrics(whole)


def test_every_layout_gives_the_same_curve_and_reshards(inputs, two, tmp_path):
    runs = {}
    for layout, sizes in LAYOUTS.items():
        two.run(train, inputs, tmp_path / layout, *sizes)
        runs[layout] = metrics(tmp_path / layout)
    with Gloo(1, init=False, timeout=300) as one:
        one.run(train, inputs, tmp_path / "one", 1)
        two.run(train, inputs, tmp_path / "tp2_then_one", 2, 1, 2)
        one.run(train, inputs, tmp_path / "tp2_then_one", 1)
    runs["tp2_then_one"] = metrics(tmp_path / "tp2_then_one")
    reference = metrics(tmp_path / "one")
    for layout, lines in runs.items():
        assert len(lines) == len(reference), layout
        for line, expected in zip(lines, reference, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6), layout

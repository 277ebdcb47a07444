"""A training step reads from the device only what it must: each such host sync empties the GPU's queue.

Syncs are counted on CPU, where they cost nothing. In tests/gpu, torch refuses them on a GPU.
"""

import collections
import traceback

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training import changed, tiny_run

QUESTIONS = ("_local_scalar_dense", "nonzero.default", "equal.default", "masked_select", "_unique")
LAYER = "decoder.layers.0:decoder.layers.0"
CASES = {
    "forward KL": {},
    "no teacher": {"teacher": None},
    "dynamic, hidden": {
        "distillation.balancer": "dynamic",
        "distillation.skip_lm_loss": False,
        "distillation.hidden_loss": "cosine",
        "distillation.hidden_layers": [LAYER],
    },
    "whole logits": {"distillation.fused_linear": False, "distillation.temperature": 2.0},
    "CP=2": {"parallelism.context_parallel_size": 2},
    "PP=2": {"parallelism.pipeline_model_parallel_size": 2},
    "TP=2": {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
}
MICRO_BATCHES = 2
ALLOWED = {
    "run_model": MICRO_BATCHES,  # the mask of a micro batch, which is still on the host
    "finish": MICRO_BATCHES,  # an asynchronous assertion on CUDA
    "_hidden_means": 1,  # the balancer's weights, which are on the host
}


class Spy(TorchDispatchMode):
    """Count host syncs by our function that causes them, without Megatron's own."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in QUESTIONS):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            frames = [f for f in frames if not f.filename.endswith("device.py")]
            if "distill_nemo" in frames[-1].filename:
                self.asked[frames[-1].name] += 1
        return func(*args, **(kwargs or {}))


def steps_under(mode, inputs, output, changes):
    """Run three steps, the last of them under `mode`."""
    from distill_nemo.training.entry import run_config
    from distill_nemo.training.loop import Loop

    config = tiny_run(inputs, output, steps=3, global_batch_size=2 * MICRO_BATCHES, eval_interval=100)
    if "teacher" in changes:
        config.teacher = None
    changed(config, {name: value for name, value in changes.items() if name != "teacher"})
    forward_backward = Loop.forward_backward

    def spied(self, iterators):
        if self.state["step"] < 2:
            return forward_backward(self, iterators)
        with mode:
            return forward_backward(self, iterators)

    Loop.forward_backward = spied
    try:
        run_config(config)
    finally:
        Loop.forward_backward = forward_backward


def questions(inputs, output, changes):
    spy = Spy()
    steps_under(spy, inputs, output, changes)
    return dict(spy.asked)


@pytest.mark.parametrize("case", CASES)
def test_only_the_host_is_asked(inputs, one, two, tmp_path, case):
    for asked in (two if "=2" in case else one).run(questions, inputs, tmp_path, CASES[case]):
        assert asked["run_model"] == MICRO_BATCHES, "the spy sees what there is to see"
        assert all(count <= ALLOWED.get(name, 0) for name, count in asked.items()), asked

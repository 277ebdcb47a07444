"""Long runs do not grow: tensors and resident memory are flat after warm-up."""

import gc
import time
import warnings
import weakref
from typing import Any

import modelopt.torch.distill as mtd
import psutil
import pytest
import torch
from torch import nn

from tests.tiny_models import write_hf
from tests.training import changed, tiny_run

STEPS, EVERY, WARM = 300, 50, 150
# The number of tensors is exactly constant. Resident memory still rises by up to 1.4 MiB between steps 150 and 300,
# more and more slowly: allocators, and Python's own caches. A leak would be larger: one [8, 1, 512] fp32 output kept
# of each of these 2 x 150 micro batches is 4.7 MiB.
MEBIBYTES = 3.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("very_tiny")
    write_hf(root / "teacher", layers=2, width=16, heads=2, groups=1)
    write_hf(root / "student", seed=2, layers=2, width=8, heads=2, groups=1)
    return root


def live_tensors():
    """Return the tensors that the garbage collector reaches. Resident memory includes those of autograd's graph."""
    time.sleep(0.2)  # gloo's threads release what they sent a little after the collective
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def watch(inputs, models, output, steps, pipeline=1, recompute=None):
    """Return, every `EVERY` steps of this rank's run, (step, live tensors, resident MiB); and calls queued for CUDA."""
    from distill_nemo.training.entry import run_config
    from distill_nemo.training.loop import Loop

    run = tiny_run(inputs, output, steps=steps, micro_batch_size=1, global_batch_size=2, eval_interval=EVERY)
    run.data.sequence_length = 8
    changed(
        run,
        {
            "student.checkpoint": str(models / "student"),
            "teacher.checkpoint": str(models / "teacher"),
            "parallelism.pipeline_model_parallel_size": pipeline,
            "training.recompute": recompute,
            "distillation.hidden_loss": "cosine",
            "distillation.hidden_layers": [f"decoder.layers.{i}:decoder.layers.{i}" for i in (0, 1)],
            "distillation.hidden_weight": 0.5,
            "checkpoint.save_interval": steps,
        },
    )
    seen, queued, log_step = [], [], Loop._log_step

    def watched(self, log, means):
        log_step(self, log, means)
        step = self.state["step"]
        if step % EVERY == 0:
            queued.append(len(torch.cuda._queued_calls))
            seen.append((step, live_tensors(), psutil.Process().memory_info().rss / 2**20))

    Loop._log_step = watched
    try:
        run_config(run)
    finally:
        Loop._log_step = log_step
    return seen, queued


@pytest.mark.parametrize(
    ("pipeline", "recompute"),
    [(2, "full"), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, None), (1, "full"), (2, None)))],
)
def test_memory_does_not_grow_with_the_steps(inputs, models, one, two, tmp_path, pipeline, recompute):
    """This includes stages that never compute the loss, which must keep no output of a micro batch."""
    for seen, _ in (one, two)[pipeline - 1].run(watch, inputs, models, tmp_path, STEPS, pipeline, recompute):
        print(seen)
        after = [(tensors, memory) for step, tensors, memory in seen if step >= WARM]
        assert len({tensors for tensors, _ in after}) == 1, seen
        assert after[-1][1] - after[0][1] < MEBIBYTES, seen


def test_modelopt_keeps_the_last_output_where_no_loss_is_computed():
    """ModelOpt 0.47's hook has one slot per layer. It drops the previous micro batch's output, with a warning."""

    def pair_of_layers():
        return nn.ModuleDict({"layer": nn.Linear(3, 3)})

    criterion = {("layer", "layer"): nn.MSELoss()}
    mode = {"teacher_model": pair_of_layers(), "criterion": criterion, "loss_balancer": None}
    model: Any = mtd.convert(pair_of_layers(), mode=[("kd_loss", mode)])
    layers = [model.layer, model.teacher_model.layer]
    outputs = []
    for _ in range(5):  # forward passes only, as on a stage that does not compute the loss
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for layer in layers:
                layer(torch.ones(2, 3))
        outputs.append([weakref.ref(layer._intermediate_output) for layer in layers])
    assert ["already has an intermediate output" in str(warning.message) for warning in caught] == [True, True]
    assert [[output() is not None for output in pair] for pair in outputs] == [[False, False]] * 4 + [[True, True]]


def test_nothing_waits_for_a_gpu_that_never_comes(inputs, models, one, tmp_path):
    """Megatron's RNG tracker sets CUDA's state with torch's `_lazy_call`, which without a GPU keeps every call forever.

    Each holds a generator's state of 5 kB and the formatted traceback of its call: about 270 kB per step of two micro
    batches.
    """
    ((_, queued),) = one.run(watch, inputs, models, tmp_path, 2 * EVERY)
    assert queued[1] == queued[0]

"""Whole runs on the device: the loop computes the same as on CPU, and the host does not wait."""

import pytest
import torch

from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.errors import errors_in_one_screen
from tests.gpu.conftest import REHEARSAL
from tests.tiny_models import write_hf
from tests.training import changed, differences, metrics, tiny_run
from tests.unit.training.test_host_syncs import CASES, steps_under

pytestmark = pytest.mark.filterwarnings("ignore")  # third parties' warnings would be errors in pytest's own process
BF16 = "float32" if REHEARSAL else "bfloat16"
VARIANTS = {
    "fused": {},
    "whole logits": {"distillation.fused_linear": False, "distillation.temperature": 2.0},
    "reverse KL, LM loss": {"distillation.divergence": "reverse_kl", "distillation.lm_weight": 0.3},
    "Jensen-Shannon": {"distillation.divergence": "jensen_shannon"},
    "top-k": {"distillation.top_k": 20},
    "hidden, dynamic": CASES["dynamic, hidden"],
    "recompute": {"training.recompute": "full"},
    "asynchronous saves": {"checkpoint.async_save": True},
    "documents apart": {"data.reset_at_documents": True},
}


def own_device():
    return setup_device().type


def test_processes_of_tests_see_no_gpu(one):
    assert one.run(own_device) == ["cpu"]


def run(inputs, output, changes):
    """Train and return the metrics."""
    from distill_nemo.training.entry import run_config

    run_config(changed(tiny_run(inputs, output), changes))
    return metrics(output)


class Refused:
    """Context in which torch raises an error if the host would wait for the GPU."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no queue to wait for")
@pytest.mark.parametrize("case", [case for case in CASES if "=2" not in case])
def test_a_gpu_is_not_waited_for(inputs, tmp_path, case):
    steps_under(Refused(), inputs, tmp_path, CASES[case] | {"training.dtype": "bfloat16"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_in_fp32_are_those_of_a_cpu(inputs, one, tmp_path, variant):
    (expected,) = one.run(run, inputs, tmp_path / "cpu", VARIANTS[variant])  # its processes see no GPU
    found = run(inputs, tmp_path / "device", VARIANTS[variant])
    worst = differences(found, expected)
    assert max(worst.values()) < 2e-3, worst


@pytest.mark.parametrize("variant", ["fused", "whole logits", "hidden, dynamic"])
def test_bf16_trains_close_to_fp32(inputs, tmp_path, variant):
    fp32 = run(inputs, tmp_path / "fp32", VARIANTS[variant])
    bf16 = run(inputs, tmp_path / "bf16", VARIANTS[variant] | {"training.dtype": BF16})
    worst = differences(bf16, fp32)
    assert worst["lm_loss"] < 0.03 and worst["logit_loss"] < 0.15, worst


def test_a_resumed_run_goes_on(inputs, tmp_path):
    fields = {"training.dtype": BF16}
    whole = run(inputs, tmp_path / "whole", fields)
    run(inputs, tmp_path / "resumed", fields | {"training.steps": 4, "optimizer.decay_steps": 8})
    resumed = run(inputs, tmp_path / "resumed", fields)
    worst = differences(resumed, whole)
    assert worst["lm_loss"] < 0.01, worst


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_of_a_cpu_goes_on_on_a_gpu(inputs, one, tmp_path, distributed):
    fields = {"optimizer.use_distributed_optimizer": distributed}
    (whole,) = one.run(run, inputs, tmp_path / "whole", fields)
    one.run(run, inputs, tmp_path / "moved", fields | {"training.steps": 4, "optimizer.decay_steps": 8})
    worst = differences(run(inputs, tmp_path / "moved", fields), whole)
    assert max(worst.values()) < 2e-3, worst


def test_an_offloaded_teacher_is_the_same_to_the_last_bit(inputs, tmp_path):
    there = run(inputs, tmp_path / "there", {"training.dtype": BF16})
    away = run(inputs, tmp_path / "away", {"training.dtype": BF16, "distillation.offload_teacher": True})
    assert away == there


def test_memory_that_runs_out_is_one_line(device, capsys):
    with pytest.raises(SystemExit), errors_in_one_screen():
        torch.empty(2**45, dtype=torch.uint8, device=device)
    whose = "this host's" if REHEARSAL else "the GPU's"
    assert capsys.readouterr().err.startswith(f"error: {whose} memory ran out")


def test_a_model_with_experts_trains_on_a_gpu(inputs, tmp_path):
    fields = {
        "student.checkpoint": write_hf(tmp_path / "student", "qwen3_moe", seed=4, layers=2, width=32),
        "teacher.checkpoint": write_hf(tmp_path / "teacher", "qwen3_moe", seed=3, layers=2),
        "training.dtype": BF16,
    }
    lines = run(inputs, tmp_path / "run", fields)
    losses = [line["logit_loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]

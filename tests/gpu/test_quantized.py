"""Quantised students on the device, with ModelOpt's own kernels: rounding, calibration, training, export."""

import json

import numpy as np
import pytest
import torch

from distill_nemo.quantization import FORMATS, QuantizationConfig
from tests import reference_quantizers as reference
from tests.gpu.conftest import REHEARSAL
from tests.modelopt_files import dequantised
from tests.training import changed, differences, metrics, tiny_run

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = [torch.float32] if REHEARSAL else [torch.float32, torch.bfloat16]
BF16 = "float32" if REHEARSAL else "bfloat16"
ROUNDED = {
    "fp8": reference.fp8,
    "nvfp4": reference.nvfp4,
    "int8": reference.int8,
    "int4_weights": lambda x, amax: reference.int4(x, amax, 128),
}
STUDENTS = {
    "fp8": QuantizationConfig("fp8", calibration_samples=8),
    "nvfp4": QuantizationConfig("nvfp4", kv_cache="fp8", calibration_samples=8),
}
# Two devices sum in another order. An activation close to a tie is then rounded to another number, a whole step away.
BEFORE, AFTER = 1e-3, 3e-2  # relative differences of metrics until the first step, and of later ones


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_are_rounded_as_by_numpy_and_the_gradient_passes(device, name, dtype):
    from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend

    from distill_nemo.models.quantizers.convert import SIMULATED_NVFP4, _configure, amax_of
    from distill_nemo.models.quantizers.nvfp4 import simulate

    register_quant_backend(SIMULATED_NVFP4, simulate)  # of a CPU
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    amax, quantizer = amax_of(x, FORMATS[name].weights), TensorQuantizer().to(device)
    _configure(quantizer, FORMATS[name].weights, amax)
    quantizer.amax = amax
    y = quantizer(x)
    y.sum().backward()
    expected = ROUNDED[name](x.detach().double().cpu().numpy(), amax.double().cpu().numpy())
    equal = np.isclose(y.detach().double().cpu().numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-8)
    assert equal.mean() > 0.999, "but for ties"
    assert bool((x.grad == 1).all()) and y.dtype == dtype


def train(inputs, output, name, changes=None):
    """Train, export, and return the metrics and the ranges of activations."""
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=4)
    run.quantization = STUDENTS[name]
    run_config(changed(run, {"training.eval_interval": 2, "checkpoint.export": True} | (changes or {})))
    return metrics(output), json.loads((output / "calibration.json").read_text())["amaxes"]


@pytest.fixture(scope="module", params=STUDENTS)
def trained(request, inputs, tmp_path_factory):
    """Return the format, and directory, metrics and ranges of a run on the device in fp32."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, output, *train(inputs, output, request.param)


def test_calibration_and_training_in_fp32_are_those_of_a_cpu(trained, inputs, one, tmp_path):
    name, _, found, ranges = trained
    ((expected, expected_ranges),) = one.run(train, inputs, tmp_path / "cpu", name)  # its processes see no GPU
    assert ranges == pytest.approx(expected_ranges, rel=1e-4)
    for part, allowed in ((slice(2), BEFORE), (slice(2, None), AFTER)):
        worst = differences(found[part], expected[part])
        del worst["top1_agreement"]  # a tie between two tokens is one of 128 here
        assert max(worst.values()) < allowed, worst


def test_numpy_reads_the_export_as_the_student_that_the_device_computed_with(trained, tmp_path):
    from safetensors.torch import load_file

    from distill_nemo.checkpoint.export import export
    from distill_nemo.config import ExportConfig

    _, output, *_ = trained
    export(ExportConfig(str(output), str(tmp_path / "rounded"), quantized="none"))
    rounded, (weights, scales) = load_file(tmp_path / "rounded/model.safetensors"), dequantised(output / "student")
    assert rounded.keys() == weights.keys() and scales
    for tensor, array in weights.items():
        assert np.allclose(array, rounded[tensor].numpy(), 2**-21, 0), tensor


def test_bf16_trains_close_to_fp32(trained, inputs, tmp_path):
    name, _, fp32, _ = trained
    bf16, _ = train(inputs, tmp_path / "bf16", name, {"training.dtype": BF16})
    worst = differences(bf16, fp32)
    assert worst["lm_loss"] < 0.05 and worst["logit_loss"] < 0.3, worst

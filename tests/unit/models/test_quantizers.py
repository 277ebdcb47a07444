"""Quantised layers compute what their formats say, values and gradients, and refuse what is not exact."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_nemo.config import DataConfig, ParallelismConfig, RunConfig, StudentConfig
from distill_nemo.models.layouts import check_layout
from distill_nemo.models.quantizers.nvfp4 import _rounded
from distill_nemo.models.resolve import quantized_as, resolve
from distill_nemo.planning.activations import saved
from distill_nemo.planning.gpus import GPUS
from distill_nemo.planning.parameters import layer_parameters
from distill_nemo.planning.plan import planned_run
from distill_nemo.planning.report import heading
from distill_nemo.quantization import QuantizationConfig
from tests import reference_quantizers as reference
from tests.tiny_models import write_hf
from tests.unit.models.test_model_provider import in_one_process, logits

FORMATS = {
    "fp8": QuantizationConfig("fp8"),
    "nvfp4": QuantizationConfig("nvfp4"),
    "nvfp4_weights": QuantizationConfig("nvfp4_weights"),
    "int8": QuantizationConfig("int8"),
    "int4_weights": QuantizationConfig("int4_weights", block_size=16),
}
PLAIN = lambda x, amax: np.asarray(x, np.float64)  # noqa: E731
ROUNDED = {  # weights, activations
    "fp8": (reference.fp8, reference.fp8),
    "nvfp4": (reference.nvfp4, reference.nvfp4),
    "nvfp4_weights": (reference.nvfp4, PLAIN),
    "int8": (reference.int8, reference.int8),
    "int4_weights": (lambda x, amax: reference.int4(x, amax, 16), PLAIN),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    return {family: write_hf(root / family, family, layers=2) for family in ("llama", "llama_tied", "deepseek_v3")}


def layers_of(student):
    """Return, by format: input, weight, amaxes, output, and the gradients of a layer of rows split into gate and up."""
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.quantizers.calibrate import measuring

    found = {}
    for name, config in FORMATS.items():
        architecture = quantized_as(resolve(StudentConfig(student)), config)
        model = model_provider(student=architecture, parallelism=ParallelismConfig())
        with measuring([model]):
            logits(model)
        assert logits(model).isfinite().all() and type(model.output_layer).__name__ == "ColumnParallelLinear"
        layer = model.decoder.layers[0].mlp.linear_fc1
        x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()  # some are clipped
        y = layer(x)[0]
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (y * slope).sum().backward()
        amaxes = [q.amax if q.is_enabled else None for q in (layer.weight_quantizer, layer.input_quantizer)]
        found[name] = (x, layer.weight, *amaxes, y, slope, x.grad, layer.weight.grad)
    return [{name: [t if t is None else t.detach().clone() for t in row] for name, row in found.items()}]


@pytest.fixture(scope="module")
def layers(students, one):
    return one.run(in_one_process, layers_of, students["llama"])[0][0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_layers_values_and_gradients_are_those_of_an_oracle(layers, name):
    x, weight, weight_amax, input_amax, y, slope, grad, weight_grad = layers[name]
    of_weights, of_inputs = ROUNDED[name]
    x64, weight64 = of_inputs(x, input_amax), of_weights(weight, weight_amax)
    assert np.abs(weight64 - weight.double().numpy()).max() > 1e-4, "rounding changes nothing"
    np.testing.assert_allclose(y.double().numpy(), x64 @ weight64.T, rtol=1e-5, atol=1e-5)
    slope64 = slope.double().numpy()
    np.testing.assert_allclose(grad.double().numpy(), slope64 @ weight64, rtol=1e-5, atol=1e-5)
    expected = np.einsum("sbo,sbi->oi", slope64, x64)
    np.testing.assert_allclose(weight_grad.double().numpy(), expected, rtol=1e-5, atol=1e-5)


def functions_after_errors(student):
    """Return, of Megatron's functions: are they the same after an error, and had the error replaced them without us?"""
    from megatron.core.tensor_parallel import layers as megatron
    from modelopt.torch.quantization.plugins.megatron import _MegatronParallelLinear

    from distill_nemo.models.provider import model_provider

    names = [name for _, name in _MegatronParallelLinear._functionals_to_replace]
    originals = {name: getattr(megatron, name) for name in names}
    architecture = quantized_as(resolve(StudentConfig(student)), FORMATS["fp8"])
    layer = model_provider(student=architecture, parallelism=ParallelismConfig()).decoder.layers[0].mlp.linear_fc1
    found = []
    for call in (layer, layer.forward):  # the second without hooks
        with pytest.raises(RuntimeError, match="shapes"):
            call(torch.zeros(1, 1, 7))
        found.append({name: getattr(megatron, name) for name in names} == originals)
    for name, original in originals.items():
        setattr(megatron, name, original)
        delattr(megatron, f"_{name}")
    return found


def test_after_an_error_in_a_quantised_layer_megatron_has_its_functions_again(students, one):
    """If the second changes, ModelOpt restores them by itself, and our hook can go."""
    assert one.run(in_one_process, functions_after_errors, students["llama"])[0] == [True, False]


@pytest.mark.parametrize("name", FORMATS)
def test_amaxes_of_weights_are_those_of_the_tensor_its_rows_or_blocks(layers, name):
    _, weight, amax, *_ = layers[name]
    magnitudes = weight.abs()
    if name == "int8":
        assert torch.equal(amax, magnitudes.amax(1, keepdim=True))
    elif name == "int4_weights":
        assert torch.equal(amax.view(len(weight), -1), magnitudes.unflatten(1, (-1, 16)).amax(-1))
    else:
        assert torch.equal(amax, magnitudes.amax())


@pytest.mark.parametrize("amax", [6.0, 3.0, 1e4])
def test_nvfp4_rounds_ties_and_clips_as_the_oracle(amax):
    """An amax below the block's clips it; one far above leaves the block's scale few bits."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat([ties, -ties]).repeat(2, 2) * torch.tensor([[1.0], [0.5]])
    x[1, :16] = 0
    np.testing.assert_allclose(_rounded(x, torch.tensor(amax)), reference.nvfp4(x, amax), rtol=1e-6)


def test_nvfp4_rounds_noise_of_every_size_as_the_oracle_and_bf16_by_fp32():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).exp2_() * 10.0 ** torch.arange(-6, 2).repeat(8)
    x[::2] *= -1
    amax = x.abs().amax()
    np.testing.assert_allclose(_rounded(x, amax), reference.nvfp4(x, amax), rtol=1e-6)
    half = x.bfloat16()
    assert torch.equal(_rounded(half, amax), _rounded(half.float(), amax).bfloat16())
    assert not _rounded(torch.zeros(1, 16), torch.tensor(0.0)).any()


def test_nvfp4_equals_modelopts_kernel_bit_for_bit():
    """Triton's interpreter truncates where a GPU rounds to E4M3, so scales are E4M3 numbers here."""
    import triton.language as tl

    place = "modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper"  # of an older version: another
    kernel = pytest.importorskip(place).fp4_fake_quant_kernel

    generator = torch.Generator().manual_seed(0)
    tensor_scale = torch.tensor(2.0**-9)
    scales = torch.from_numpy(reference.E4M3[64:][torch.randint(63, (32, 4), generator=generator).numpy()]).float()
    x = torch.rand(32, 4, 16, generator=generator) * 2 - 1
    x[:, :, 0] = 1
    x = (x * 6 * scales[..., None] * tensor_scale).view(32, 64)
    x[0, :16] = 0
    found, tile = torch.empty_like(x), {"BLOCK_SIZE": 16, "TILE_M": 16, "TILE_N": 64, "NUM_FP4_BLOCKS": 4}
    strides = (*x.stride(), *found.stride())
    kernel[(2, 1)](x, found, 32, 64, tensor_scale, *strides, **tile, OUT_DTYPE=tl.float32)
    assert torch.equal(found, _rounded(x, tensor_scale * 6 * 448))


@pytest.mark.parametrize(
    ("family", "config", "tensor", "refusal"),
    [
        (
            "llama",
            QuantizationConfig("int4_weights", block_size=32),
            2,
            "blocks of 32 weights, which do not divide the 48 of a row of decoder.layers.0.mlp.linear_fc2 on each of "
            "parallelism.tensor_model_parallel_size = 2 ranks: choose another tensor parallel size, set quantization",
        ),
        ("llama", QuantizationConfig("int4_weights"), 1, "blocks of 128 weights, .* the 64 of a row of .*linear_qkv: "),
        ("llama_tied", QuantizationConfig("fp8", exclude=[]), 1, 'add "output_layer" to quantization.exclude'),
        ("deepseek_v3", QuantizationConfig(kv_cache="fp8"), 1, "latent attention, .* caches the latents"),
        ("deepseek_v3", QuantizationConfig("nvfp4"), 1, "do not divide the 24 of a row of .*linear_q_up_proj"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(students, family, config, tensor, refusal):
    model = quantized_as(resolve(StudentConfig(students[family])), config)
    with pytest.raises(ValueError, match=refusal):
        check_layout(model, ParallelismConfig(tensor_model_parallel_size=tensor))
    excluded = QuantizationConfig(config.format, block_size=config.block_size, exclude=["*"])
    check_layout(replace(model, quantization=excluded), ParallelismConfig())


@pytest.mark.parametrize("pattern", ["model.layers.0.mlp.down_proj", "lm_head", "decoder.layers.7.*", "linear_fc1"])
def test_a_pattern_that_excludes_nothing_is_refused_with_names_that_would(students, pattern):
    config = QuantizationConfig("fp8", exclude=["output_layer", pattern])
    with pytest.raises(ValueError, match=r"exclude: .* matches no linear layer .*decoder\.layers\.0\..*output_layer"):
        quantized_as(resolve(StudentConfig(students["llama"])), config)


def test_patterns_that_exclude_everything_are_refused(students):
    config = QuantizationConfig("fp8", exclude=["output_layer", "decoder.*"])
    with pytest.raises(ValueError, match=r"exclude = \['output_layer', 'decoder\.\*'\] leaves no linear layer"):
        quantized_as(resolve(StudentConfig(students["llama"])), config)


def test_a_student_stays_as_its_run_quantised_it_if_the_numbers_are_the_same(students):
    before = QuantizationConfig("int4_weights", exclude=["output_layer", "decoder.layers.1.*"], calibration_samples=8)
    student = replace(resolve(StudentConfig(students["llama"])), quantization=before)
    same = QuantizationConfig("int4_weights", block_size=128, exclude=["decoder.layers.[1].*", "output_layer"])
    assert quantized_as(student, same).quantization is before
    with pytest.raises(ValueError, match=r"by its run with quantization\.block_size = None, not 64: leave quant"):
        quantized_as(student, replace(before, block_size=64, calibration_samples=512))
    with pytest.raises(ValueError, match=r"by its run with quantization\.exclude = .*, not \['output_layer'\]: leave"):
        quantized_as(student, replace(before, exclude=["output_layer"]))


def save_without_calibration(student, output):
    """Write a checkpoint whose amaxes of activations are NaN."""
    from megatron.core import dist_checkpointing

    from distill_nemo.checkpoint.state import model_state
    from distill_nemo.models.provider import model_provider

    architecture = quantized_as(resolve(StudentConfig(student)), FORMATS["fp8"])
    model = model_provider(student=architecture, parallelism=ParallelismConfig())
    Path(output).mkdir()
    dist_checkpointing.save(model_state(model), output)
    own = asdict(architecture.filled(StudentConfig())) | {"quantization": asdict(FORMATS["fp8"])}
    Path(output, "architecture.json").write_text(json.dumps(own))


def test_amaxes_that_no_run_has_saved_are_refused(students, one, tmp_path):
    path = tmp_path / "m"
    one.run(in_one_process, save_without_calibration, students["llama"], str(path))
    with pytest.raises(ValueError, match=r"layers\.0\..*input_quantizer has amaxes that are not positive and finite"):
        one.run(in_one_process, load, str(path))
    description = path / "architecture.json"
    for config, problem in (
        (FORMATS["int8"], r"weight_quantizer\._amax has shape \(2, 1\), needs \(2, \d+, 1\)"),
        (QuantizationConfig("fp8", kv_cache="fp8"), r"k_bmm_quantizer\._amax is missing"),
    ):
        own = json.loads(description.read_text()) | {"quantization": asdict(config)}
        description.write_text(json.dumps(own))
        with pytest.raises(ValueError, match=f"does not fit its quantization: .*{problem}"):
            one.run(in_one_process, load, str(path))
    plain = json.loads(description.read_text())
    del plain["quantization"]
    description.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"extra: .*_quantizer\._amax"):
        one.run(in_one_process, load, str(path))


def load(path):
    from distill_nemo.models.provider import model_provider

    model_provider(student=StudentConfig(path), parallelism=ParallelismConfig())


def test_a_plan_says_that_the_student_is_quantised_and_counts_the_rounded_weights(students):
    run = RunConfig("out", StudentConfig(students["llama"]), data=DataConfig(["any"], sequence_length=32))
    run.quantization = QuantizationConfig("nvfp4", kv_cache="fp8")
    planned = planned_run(run, 1)
    assert heading("r", planned, GPUS["h100"])[1].endswith("local layers; student quantised: nvfp4 and cache in fp8")
    plain = planned_run(replace(run, quantization=QuantizationConfig()), 1, transformer_engine=False)
    student = plain.models.student
    layer = student.layers[0]
    more = saved(planned, planned.models.student, layer, None) - saved(plain, student, layer, None)
    assert more == 2 * layer_parameters(student, layer, ParallelismConfig()).total

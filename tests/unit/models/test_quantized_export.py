"""Quantised students in ModelOpt's format, against ModelOpt's exporter, numpy, compressed-tensors and transformers."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from distill_nemo.config import ExportConfig, ParallelismConfig, StudentConfig
from distill_nemo.quantization import QuantizationConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.modelopt_files import GROUP, PRESETS, dequantised, stored, write_modelopt
from tests.tiny_models import write_hf
from tests.training import tiny_run

FORMATS = list(PRESETS)
MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # here one tensor has the amax; ModelOpt has several


def tokens():
    return torch.randint(507, (2, 32), generator=torch.Generator().manual_seed(0))


def quantization(preset, **changes):
    block = GROUP if preset == "int4_weights" else None
    return QuantizationConfig(format=preset, block_size=block, **changes)


def quantised(path, layout, config):
    """Return the architecture and this rank's stage, with the same amaxes of activations at every layout."""
    from megatron.core import parallel_state as ps

    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.quantizers.calibrate import amaxes_of, set_amaxes
    from distill_nemo.models.resolve import resolve

    student = dataclasses.replace(resolve(StudentConfig(checkpoint=str(path))), quantization=config)
    first, last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
    model = model_provider(first, last, student=student, parallelism=layout.config())
    set_amaxes([model], {name: 1 + sum(map(ord, name)) % 97 / 97 for name in amaxes_of([model])})
    return student, model


def export(path, output, layout, config, quantized="modelopt", limit=10**9, whole=True):
    """Export at a layout. Return the logits of one process, its activations rounded."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints.agreement import _logits
        from distill_nemo.models.checkpoints.exportable import check_exportable
        from distill_nemo.models.checkpoints.file_formats import FILE_FORMATS
        from distill_nemo.models.checkpoints.huggingface import export_hf
        from distill_nemo.models.checkpoints.write_safetensors import write_weights

        student, model = quantised(path, layout, config)
        check_exportable(student, quantized, layout.config())
        if whole:
            export_hf([model], str(output), student, source=Path(path), max_file_bytes=limit, quantized=quantized)
        else:
            Path(output).mkdir(exist_ok=True)
            write_weights([model], student, Path(output), limit, file_format=FILE_FORMATS[quantized])
        return _logits([model], tokens()) if layout == Layout() else None


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("export") / "plain", layers=2)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, plain, one):
    """Return (format, directory, logits of the student that was exported)."""
    output = Path(plain).with_name(request.param)
    return request.param, output, one.run(export, plain, output, Layout(), quantization(request.param))[0]


def test_it_is_what_modelopts_own_exporter_writes(exported, plain, tmp_path):
    name, ours, _ = exported
    theirs = write_modelopt(plain, tmp_path / "modelopt", name)
    ours_stored, expected = stored(ours), stored(theirs)
    assert ours_stored.keys() == expected.keys()
    for tensor, (dtype, array) in expected.items():
        of_ours, found = ours_stored[tensor]
        assert (of_ours, found.shape) == (dtype, array.shape), tensor
        other_amax = name == "fp8" and tensor.split(".")[-2] in FUSED
        if not tensor.endswith("input_scale") and not other_amax:
            assert (found == array).all(), tensor
    stated, expected = (json.loads(Path(each, "hf_quant_config.json").read_text()) for each in (ours, theirs))
    if name == "int4_weights":
        expected["quantization"]["pre_quant_scale"] = False  # ModelOpt states some, and stores none
    assert stated == expected
    configs = [json.loads(Path(each, "config.json").read_text())["quantization_config"] for each in (ours, theirs)]
    assert configs[0] == configs[1]


def test_dequantised_by_numpy_it_is_the_student_whose_weights_are_rounded(exported, plain, one, tmp_path):
    name, path, _ = exported
    one.run(export, plain, tmp_path / "rounded", Layout(), quantization(name), "none")
    rounded, weights = load_file(tmp_path / "rounded/model.safetensors"), dequantised(path)[0]
    original = load_file(f"{plain}/model.safetensors")
    assert rounded.keys() == weights.keys() == original.keys()
    for tensor, array in weights.items():
        expected = rounded[tensor].numpy()
        assert np.array_equal(array, expected) if "nvfp4" in name else np.allclose(array, expected, 2**-21, 0), tensor
        assert torch.equal(rounded[tensor], original[tensor]) == ("_proj" not in tensor)
    assert "quantization_config" not in json.loads((tmp_path / "rounded/config.json").read_text())


def rounded_input(preset, scale, x):
    """Round to multiples of a scale: independent of the package and of ModelOpt."""
    if preset == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    if preset == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    blocks = x.unflatten(-1, (-1, 16))
    of_block = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = ((blocks / of_block.clamp_min(1e-30)).abs()[..., None] - grid).abs().argmin(-1)
    return (grid[nearest].copysign(blocks) * of_block).flatten(-2)


def test_transformers_with_these_weights_and_scales_gives_the_students_logits(exported, plain):
    from transformers import AutoModelForCausalLM

    name, path, expected = exported
    weights, scales = dequantised(path)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    model.load_state_dict({tensor: torch.from_numpy(array.copy()) for tensor, array in weights.items()})
    assert bool(scales) == (name not in ("nvfp4_weights", "int4_weights"))
    with torch.no_grad():
        plain_inputs = model(tokens()).logits
    for module, scale in scales.items():
        hook = lambda _, args, scale=scale: rounded_input(name, scale, args[0])  # noqa: E731
        model.get_submodule(module).register_forward_pre_hook(hook)
    with torch.no_grad():
        found = model(tokens()).logits
    assert (found - expected[..., :507]).norm() < 3e-3 * found.norm()
    if scales:
        assert (found - plain_inputs).norm() > 1e-2 * found.norm(), "rounding of inputs shows"


def test_it_is_read_back_as_the_same_model(exported, one, tmp_path):
    from tests.unit.models.test_quantized_sources import exported as plain_export

    _, path, _ = exported
    weights = one.run(plain_export, str(path), str(tmp_path / "again"), Layout())  # and compares with transformers
    assert weights
    again, expected = load_file(tmp_path / "again/model.safetensors"), dequantised(path)[0]
    assert all(np.array_equal(again[tensor].numpy(), array) for tensor, array in expected.items())


def for_benchmarks(path, target):
    from distill_nemo.benchmarks.evaluate import as_huggingface
    from distill_nemo.job_config import EvaluateConfig

    return as_huggingface(str(path), Path(target), EvaluateConfig())


def test_benchmarks_are_given_its_rounded_weights(exported, plain, one, tmp_path):
    assert one.run(for_benchmarks, plain, tmp_path / "none") == [Path(plain)]
    [opened] = one.run(for_benchmarks, exported[1], tmp_path / "opened")
    found, expected = load_file(opened / "model.safetensors"), dequantised(exported[1])[0]
    assert all(np.array_equal(found[tensor].numpy(), array) for tensor, array in expected.items())


LAYOUTS = {"TP=2": Layout(tensor=2), "PP=2": Layout(pipeline=2), "DP=2": Layout()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["nvfp4", "int4_weights", "int8"])
def test_every_layout_writes_the_same_bytes(plain, one, two, tmp_path, preset, layout):
    config = quantization(preset, kv_cache="fp8")
    one.run(export, plain, tmp_path / "one", Layout(), config)
    two.run(export, plain, tmp_path / "two", LAYOUTS[layout], config, "modelopt", 60_000)
    found, expected = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert all((found[name][1] == array).all() and found[name][0] == dtype for name, (dtype, array) in expected.items())
    assert float(found["model.layers.1.self_attn.v_proj.v_scale"][1]) > 0
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    stated = [json.loads((tmp_path / each / "hf_quant_config.json").read_text()) for each in ("one", "two")]
    assert stated[0] == stated[1] and stated[0]["quantization"]["kv_cache_quant_algo"] == "FP8"


def export_of_zeros(path, output, config, grown):
    """Export a student of which a layer's weights and inputs were 0 in calibration. Return its weights as it computes.

    Weights that have grown since are beyond their ranges.
    """
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.models.checkpoints.huggingface import export_hf
        from distill_nemo.models.quantizers.calibrate import amaxes_of, set_amaxes

        student, model = quantised(path, Layout(), config)
        layer = model.decoder.layers[0].mlp.linear_fc2
        set_amaxes(
            [model], {name: 0.0 if "layers.0.mlp" in name else amax for name, amax in amaxes_of([model]).items()}
        )
        with torch.no_grad():
            layer.weight += grown * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
            export_hf([model], str(output), student, source=Path(path))
            return layer.weight_quantizer(layer.weight).numpy()


@pytest.mark.parametrize("grown", [0.0, 1.0])
@pytest.mark.parametrize("preset", FORMATS)
def test_what_was_zero_in_calibration_has_positive_scales(plain, one, tmp_path, preset, grown):
    zeros = "model.layers.0.mlp.down_proj"
    path, tensors = shutil.copytree(plain, tmp_path / "plain"), load_file(f"{plain}/model.safetensors")
    tensors[f"{zeros}.weight"].zero_()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    expected = one.run(export_of_zeros, path, tmp_path / "out", quantization(preset), grown)[0]
    weights, inputs = dequantised(tmp_path / "out")
    assert np.array_equal(weights[f"{zeros}.weight"], expected)
    for name, (dtype, array) in stored(tmp_path / "out").items():
        scales = array if dtype == "F32" else np.ones(1)
        assert "scale" not in name or (np.isfinite(scales) & (scales > 0)).all(), name
    if preset in ("fp8", "int8", "nvfp4"):  # as ModelOpt exports an amax of 0
        assert inputs[zeros] == pytest.approx({"nvfp4": 1 / 448}.get(preset, 1.0))


def test_experts_are_written_one_by_one_at_every_layout(one, two, tmp_path):
    path = write_hf(tmp_path / "plain", "qwen3_moe", layers=2)
    config = quantization("nvfp4")
    one.run(export, path, tmp_path / "one", Layout(), config)
    two.run(export, path, tmp_path / "two", Layout(expert=2), config)
    found, expected = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert found.keys() == expected.keys() and "model.layers.0.mlp.experts.3.up_proj.weight_scale_2" in found
    assert all((found[name][1] == array).all() for name, (_, array) in expected.items())
    ignored = json.loads((tmp_path / "one/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "model.layers.1.mlp.gate" in ignored and "lm_head" in ignored


@pytest.mark.parametrize(("preset", "quantized"), [("nvfp4", MODELOPT), ("int4_weights", COMPRESSED)])
def test_an_export_goes_on_with_the_files_that_are_whole(plain, two, tmp_path, preset, quantized):
    def write(output):
        two.run(export, plain, output, Layout(tensor=2), quantization(preset), quantized, 20_000, False)
        return {file.name: (file.stat().st_ino, file.read_bytes()) for file in output.glob("*.safetensors")}

    first = write(tmp_path / "out")
    damaged = next(name for name in first if b"down_proj.weight_scale" in first[name][1])
    with (tmp_path / "out" / damaged).open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([first[damaged][1][-1] ^ 1]))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    again = write(tmp_path / "out")
    rewritten = {name for name in again if (tmp_path / "out" / name).stat().st_mtime_ns != before[name]}
    assert rewritten == {damaged} and {n: x for n, (_, x) in again.items()} == {n: x for n, (_, x) in first.items()}


def train(inputs, output):
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=3)
    run.quantization = QuantizationConfig(format="nvfp4", kv_cache="fp8", calibration_samples=4)
    run.parallelism.pipeline_model_parallel_size = 2
    run.checkpoint.save_interval, run.checkpoint.export, run.checkpoint.quantized = 3, True, COMPRESSED
    run_config(run)


def export_run(output, target, quantized):
    from distill_nemo.checkpoint.export import export

    export(ExportConfig(str(output), str(target), quantized=quantized))


def test_a_run_and_a_later_export_at_another_layout_hold_the_same_student(inputs, one, two, tmp_path):
    two.run(train, inputs, tmp_path / "run")
    for quantized in (MODELOPT, COMPRESSED, "none"):
        one.run(export_run, tmp_path / "run", tmp_path / quantized, quantized)
    of_run, again = stored(tmp_path / "run/student"), stored(tmp_path / COMPRESSED)
    assert of_run.keys() == again.keys() and "model.layers.1.self_attn.k_scale" in of_run
    assert all((again[name][1] == array).all() for name, (_, array) in of_run.items())
    rounded = load_file(tmp_path / "none/model.safetensors")
    weights, inputs_scales = dequantised(tmp_path / MODELOPT)
    assert all(np.array_equal(rounded[name].numpy(), array) for name, array in weights.items())
    assert len(inputs_scales) == 14 and (tmp_path / "run/student/tokenizer.json").is_file()
    library = {
        name: (tmp_path / name / "README.md").read_text().split("library_name: ")[1].split("\n")[0]
        for name in ("run/student", MODELOPT, "none")
    }
    assert library == {"run/student": "transformers", MODELOPT: "Model Optimizer", "none": "transformers"}


NVFP4_NAMES = {  # of the codes, and scales of the tensor and of the input
    MODELOPT: ("weight", "weight_scale_2", "input_scale"),
    COMPRESSED: ("weight_packed", "weight_global_scale", "input_global_scale"),
}


def damage(path, output, quantized):
    """Export, and change one bit of codes or a scale before the check."""
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.models.checkpoints.file_formats import FILE_FORMATS
        from distill_nemo.models.checkpoints.write_safetensors import check_written, write_weights
        from distill_nemo.runtime.everyone import Everyone

        student, model = quantised(path, Layout(), quantization("nvfp4"))
        file_format = FILE_FORMATS[quantized]
        Path(output).mkdir()
        shutil.copy(Path(path, "config.json"), output)
        write_weights([model], student, Path(output), file_format=file_format)
        check_written([model], student, Path(output), Everyone(), None, file_format)
        refusals = []
        codes, of_tensor, of_input = NVFP4_NAMES[quantized]
        for name, change in {
            f"mlp.down_proj.{codes}": lambda x: x ^ (torch.arange(x.numel()) == 5).view_as(x).to(torch.uint8),
            f"mlp.up_proj.{of_tensor}": lambda x: x * (1 + 2**-20),
            f"mlp.up_proj.{of_input}": lambda x: x * (1 + 2**-20),
        }.items():
            tensors = load(Path(output, "model.safetensors").read_bytes())  # no map: they are written over it
            changed = {f"model.layers.1.{name}": change(tensors[f"model.layers.1.{name}"])}
            save_file(tensors | changed, f"{output}/model.safetensors")
            with pytest.raises(RuntimeError) as raised:
                check_written([model], student, Path(output), Everyone(), None, file_format)
            refusals.append(str(raised.value))
            save_file(tensors, f"{output}/model.safetensors")
        return refusals


@pytest.mark.parametrize("quantized", NVFP4_NAMES)
def test_a_wrong_code_or_scale_is_found_before_publishing(plain, one, tmp_path, quantized):
    found = one.run(damage, plain, str(tmp_path / "out"), quantized)[0]
    assert all("is not what was written" in refusal for refusal in found)
    assert [re.search(r"layers\.1\.mlp\.(\S+) is", refusal)[1] for refusal in found] == [
        "down_proj.weight", "up_proj.weight", f"up_proj.{NVFP4_NAMES[quantized][2]}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "quantized", "tensor", "message"),
    [
        ("llama", QuantizationConfig(kv_cache="fp8"), MODELOPT, 1, "kv_cache without quantization.format is not read"),
        (
            "llama_tied",
            QuantizationConfig(format="fp8", exclude=[]),
            COMPRESSED,
            1,
            "output_layer is quantised, but its weights are",
        ),
        (
            "gpt_oss",
            QuantizationConfig(format="nvfp4"),
            COMPRESSED,
            1,
            "mlp.experts.gate_up_proj holds several matrices",
        ),
        (
            "llama",
            QuantizationConfig(format="fp8", kv_cache="fp8", exclude=["output_layer", "*.1.*.linear_qkv"]),
            MODELOPT,
            1,
            "decoder.layers.1.self_attention.linear_qkv is in quantization.exclude, so scales of its keys and values",
        ),
        (
            "glm4_moe_lite",
            QuantizationConfig(format="fp8", kv_cache="fp8"),
            MODELOPT,
            1,
            "has no k_proj and v_proj to name its",
        ),
        ("odd", quantization("int4_weights"), MODELOPT, 2, "a tensor-parallel rank has its rows"),
        ("odd", quantization("int4_weights"), COMPRESSED, 1, "has 20 columns, but INT4 holds eight a number"),
        (
            "llama",
            QuantizationConfig(format="nvfp4", kv_cache="nvfp4"),
            COMPRESSED,
            1,
            'quantization.kv_cache = "nvfp4" cannot be stated in the format compressed-tensors; choose fp8',
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(tmp_path, family, config, quantized, tensor, message):
    from distill_nemo.models.checkpoints.exportable import check_exportable
    from distill_nemo.models.resolve import resolve

    if family == "glm4_moe_lite":
        pytest.importorskip("transformers.models.glm4_moe_lite")
    odd = {"width": 20, "heads": 2} if family == "odd" else {}
    path = write_hf(tmp_path / "plain", "llama" if odd else family, layers=2, **odd)
    student = dataclasses.replace(resolve(StudentConfig(checkpoint=path)), quantization=config)
    layout = ParallelismConfig(tensor_model_parallel_size=tensor)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_exportable(student, quantized, layout)
    assert "quantized=none" in str(raised.value)
    check_exportable(student, "none", layout)

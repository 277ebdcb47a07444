"""Quantised students in the format of compressed-tensors, against that library on a CPU, transformers and numpy."""

import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from distill_nemo.config import StudentConfig
from tests import modelopt_files
from tests.compressed_files import dequantised, parts, write_compressed
from tests.distillation import Layout
from tests.modelopt_files import stored
from tests.tiny_models import write_hf
from tests.unit.models.test_modelopt_sources import reader_of
from tests.unit.models.test_quantized_export import FORMATS, LAYOUTS, export, quantization, tokens
from tests.unit.models.test_quantized_sources import exported as plain_export

pytest.importorskip("compressed_tensors")
COMPRESSED = "compressed-tensors"
EXACT = 2688 * 2.0**-14  # an amax whose NVFP4 numbers fit bf16, in which the library unpacks them


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a model whose matrices have the same largest value."""
    path = write_hf(tmp_path_factory.mktemp("compressed") / "plain", layers=2)
    tensors = load(Path(path, "model.safetensors").read_bytes())
    for name in (name for name in tensors if "_proj" in name):
        scaled = tensors[name] * (1.01 * EXACT / tensors[name].abs().max())
        tensors[name] = scaled.clamp(-EXACT, EXACT)
    save_file(tensors, f"{path}/model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module", params=[*FORMATS, "fp8 and cache"])
def exported(request, plain, one):
    """Return (format, directory, logits of the student that was exported)."""
    name, cache = request.param.partition(" and ")[::2]
    output, config = Path(plain).with_name(request.param), quantization(name, kv_cache="fp8" if cache else "none")
    return name, output, one.run(export, plain, output, Layout(), config, COMPRESSED)[0]


def opened(path, dtype=torch.float32):
    """Open a directory as its users do, with dequantised weights and rounded inputs."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    if "cache" in Path(path).name and "past_key_values" not in inspect.signature(LlamaAttention.forward).parameters:
        pytest.skip("compressed-tensors 0.20 does not find the cache of transformers 5.24, and leaves it unrounded")
    if "dequantize" not in inspect.signature(CompressedTensorsConfig).parameters:
        config = CompressedTensorsConfig(run_compressed=False)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()  # `dequantize` leaves inputs unrounded
    ModelCompressor.from_pretrained_model(model).decompress_model(model)  # as the first pass does, in fp32 too
    return model


def test_transformers_opens_it_and_gives_the_students_logits_with_rounded_inputs(exported, plain):
    name, path, expected = exported
    model = opened(path)
    weights = {key: value for key, value in model.state_dict().items() if key.endswith(("weight", "bias"))}
    of_numpy = dequantised(path)
    assert weights.keys() == of_numpy.keys()
    assert all(np.array_equal(weights[each].float().numpy(), array) for each, array in of_numpy.items())
    with torch.no_grad():
        found = torch.nn.Module.float(model)(tokens()).logits  # the library unpacks NVFP4 in bf16
    assert (found - expected[..., :507]).norm() < 3e-3 * found.norm()
    for module in model.modules():
        module.quantization_enabled = False
    with torch.no_grad():
        unrounded = model(tokens()).logits
    rounds_inputs = name not in ("nvfp4_weights", "int4_weights")
    assert ((found - unrounded).norm() > 1e-2 * found.norm()) == rounds_inputs, "rounding of inputs shows"


def test_transformers_opens_it_without_options_and_computes_the_same(exported):
    from transformers import AutoModelForCausalLM

    _, path, _ = exported
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()(tokens()).logits
        expected = opened(path, torch.bfloat16)(tokens()).logits
    assert torch.equal(found, expected)


def test_its_codes_and_scales_are_those_of_modelopts_file(exported, plain, one, tmp_path):
    name, path, _ = exported
    config = quantization(name, kv_cache="fp8" if "cache" in path.name else "none")
    one.run(export, plain, tmp_path / "modelopt", Layout(), config)
    theirs, ours = stored(tmp_path / "modelopt"), stored(path)
    expected, _ = modelopt_files.dequantised(tmp_path / "modelopt")
    found = parts(path)
    assert len(found) == 14
    for module, (values, scales) in found.items():
        assert np.array_equal(values * scales, expected[f"{module}.weight"]), module
        assert (ours[f"{module}.weight_scale"][1].ravel() == theirs[f"{module}.weight_scale"][1].ravel()).all()
    reciprocals = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
    kept = {"k_proj.k_scale": "k_scale", "v_proj.v_scale": "v_scale", "input_scale": "input_scale"}
    for tensor, (_, scale) in theirs.items():
        for old, new in (reciprocals | ({} if "nvfp4" in name else kept)).items():
            if tensor.endswith(old) and (other := tensor.removesuffix(old) + new) in ours:
                value = np.float32(1) / scale if new.endswith("global_scale") else scale
                assert ours[other][0] == "F32" and np.array_equal(ours[other][1], value.reshape(1)), tensor
                ours.pop(other)
    assert not any(re.search(r"global_scale|input_scale|[kv]_scale", left) for left in ours)


def test_the_library_writes_the_same_bytes_and_states_the_same(exported, tmp_path):
    from compressed_tensors.compressors import ModelCompressor

    _, path, _ = exported
    model = opened(path)
    model._weight_conversions = None  # or the library renames what it ignores, as it was renamed for opening
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    compressor.update_config(str(tmp_path))
    found, expected = stored(path), stored(tmp_path)
    assert found.keys() == expected.keys()
    for tensor, (dtype, array) in expected.items():
        of_ours, ours = found[tensor]
        if dtype == "U8":  # the library makes 0 of -0, which has the code 8
            ours = np.where(ours & 15 == 8, ours & 240, ours)
            ours = np.where(ours >> 4 == 8, ours & 15, ours)
        assert of_ours == dtype and ours.tobytes() == array.tobytes(), tensor
    ours, theirs = (
        json.loads(Path(each, "config.json").read_text())["quantization_config"] for each in (path, tmp_path)
    )
    embedding = {"model.embed_tokens"}  # is no linear layer, so the library does not list it
    assert {*ours.pop("ignore")} - embedding == {*theirs.pop("ignore")}
    assert theirs.pop("moe_sparsity_config", None) is None and ours == theirs


@pytest.mark.parametrize("layout", ["TP=2", "PP=2"])
@pytest.mark.parametrize("preset", ["nvfp4", "int4_weights", "int8", "fp8"])
def test_every_layout_writes_the_same_bytes(one, two, tmp_path, preset, layout):
    plain, config = write_hf(tmp_path / "plain", layers=2), quantization(preset, kv_cache="fp8")
    one.run(export, plain, tmp_path / "one", Layout(), config, COMPRESSED)
    two.run(export, plain, tmp_path / "two", LAYOUTS[layout], config, COMPRESSED)
    found, expected = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert found.keys() == expected.keys() and "model.layers.1.self_attn.v_scale" in found
    assert all((found[name][1] == array).all() and found[name][0] == dtype for name, (dtype, array) in expected.items())
    if layout == "TP=2":
        assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()
    configs = [(tmp_path / each / "config.json").read_text() for each in ("one", "two")]
    assert configs[0] == configs[1]


def test_experts_are_written_one_by_one(one, two, tmp_path):
    path, config = write_hf(tmp_path / "plain", "qwen3_moe", layers=2), quantization("int4_weights")
    [logits] = one.run(export, path, tmp_path / "one", Layout(), config, COMPRESSED)
    two.run(export, path, tmp_path / "two", Layout(expert=2), config, COMPRESSED)
    found, expected = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert found.keys() == expected.keys() and "model.layers.0.mlp.experts.3.up_proj.weight_packed" in found
    assert all((found[name][1] == array).all() for name, (_, array) in expected.items())
    ignored = json.loads((tmp_path / "one/config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.gate" in ignored and "lm_head" in ignored
    with torch.no_grad():
        assert torch.allclose(opened(tmp_path / "one")(tokens()).logits, logits[..., :507], atol=1e-5)


def test_it_is_read_back_as_the_same_model(exported, one, tmp_path):
    _, path, _ = exported
    one.run(plain_export, str(path), str(tmp_path / "again"), Layout())  # and compares with transformers
    again, expected = load_file(tmp_path / "again/model.safetensors"), dequantised(path)
    assert all(np.array_equal(again[tensor].numpy(), array) for tensor, array in expected.items())


def test_a_plain_student_is_refused(plain):
    from distill_nemo.models.checkpoints.exportable import check_exportable
    from distill_nemo.models.resolve import resolve

    student = resolve(StudentConfig(checkpoint=plain))
    with pytest.raises(ValueError, match=r'quantized = "compressed-tensors", but .* is not quantised; leave it out'):
        check_exportable(student, COMPRESSED)
    check_exportable(student, "modelopt")


FLOAT, INT = {"num_bits": 8, "type": "float"}, {"type": "int"}
TOKEN = {"strategy": "token", "dynamic": True}
PUBLISHED = {  # weights, inputs and dtype, as they are published
    "FP8-dynamic": (FLOAT | {"strategy": "channel"}, FLOAT | TOKEN, torch.bfloat16),
    "FP8": (FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor"}, torch.bfloat16),
    "FP8-block": (FLOAT | {"strategy": "block", "block_structure": [16, 32]}, FLOAT | TOKEN, torch.bfloat16),
    "quantized.w4a16": (INT | {"num_bits": 4, "strategy": "group", "group_size": 16}, None, torch.bfloat16),
    "w4a16 by rows": (INT | {"num_bits": 4, "strategy": "channel"}, None, torch.float16),
    "quantized.w8a8": (INT | {"num_bits": 8, "strategy": "channel"}, INT | {"num_bits": 8} | TOKEN, torch.bfloat16),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_checkpoints_are_read_as_the_library_reads_them(plain, tmp_path, published):
    from distill_nemo.models.families.pieces import Piece

    weights, inputs, dtype = PUBLISHED[published]
    path = write_compressed(plain, tmp_path / "published", weights, inputs, dtype)
    expected = opened(path, dtype).state_dict()
    original = load_file(f"{plain}/model.safetensors")
    with reader_of(path) as reader:
        assert reader.stored.keys() == original.keys()
        for name in reader.stored:
            index = tuple(slice(0, size) for size in original[name].shape)
            found = reader.read(Piece(name, index))
            assert torch.equal(found.to(dtype), expected[name]), name
            changed = (found.float() - original[name]).norm() / original[name].norm()
            assert (changed > 0.005) == ("_proj" in name)
        q = "model.layers.0.self_attn.q_proj.weight"
        whole = reader.read(Piece(q, (slice(0, 64), slice(0, 64))))
        for top, bottom, left, right in ((31, 33, 15, 49), (1, 2, 0, 1), (63, 64, 33, 64)):
            index = (slice(top, bottom), slice(left, right))
            assert torch.equal(reader.read(Piece(q, index)), whole[index])


OF_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
REFUSED = {
    "format 'marlin-24'": {"format": "marlin-24"},
    "quantization_status 'frozen'": {"quantization_status": "frozen"},
    "group_0 with weights {'num_bits': 8, 'strategy': 'group', 'type': 'int'}": {
        "config_groups": {"group_0": {"weights": OF_INT4 | {"num_bits": 8}}}
    },
    "group_0: weights with symmetric False": {
        "config_groups": {"group_0": {"weights": OF_INT4 | {"symmetric": False}}}
    },
    "weights with block_structure [128]": {
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"weights": FLOAT | {"symmetric": True, "strategy": "block", "block_structure": [128]}}
        },
    },
    "with transform_config": {"transform_config": {"config_groups": {"u": {}}}},
    "with sparsity_config": {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "config_groups must be an object": {"config_groups": [1]},
    "weights must be an object": {"config_groups": {"group_0": {"weights": "W4A16"}}},
    "ignore must be a list of names": {"ignore": "lm_head"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_code_times_scale_is_refused_by_name(message):
    from distill_nemo.models.stored_quantization import read_stored_quantization

    stated = {"quant_method": COMPRESSED, "format": "pack-quantized", "quantization_status": "compressed"}
    stated |= {"config_groups": {"group_0": {"weights": OF_INT4}}}
    assert read_stored_quantization({"quantization_config": stated}, "m/config.json") is not None
    with pytest.raises(ValueError) as raised:
        read_stored_quantization({"quantization_config": stated | REFUSED[message]}, "m/config.json")
    assert message in str(raised.value) and len(str(raised.value)) < 600 and "\n" not in str(raised.value)


Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "weight_scale is missing": {"weight_scale": None},
    "weight_shape is missing": {"weight_shape": None},
    "weight_scale has 3 groups, which do not divide 64 columns": {"weight_scale": torch.ones(64, 3)},
    "weight_shape is I64 (3,), must be I64 or I32 (2,)": {"weight_shape": torch.ones(3, dtype=torch.int64)},
    "must have 2 dimensions, and": {"weight": torch.ones(64, 64)},
    "extra: model.layers.0.self_attn.q_proj.weight_zero_point (8, 4)": {"weight_zero_point": torch.ones(8, 4)},
    "extra: model.layers.0.self_attn.q_proj.weight_g_idx (64,)": {"weight_g_idx": torch.ones(64)},
}


@pytest.fixture(scope="module")
def int4(plain, one, tmp_path_factory):
    output = tmp_path_factory.mktemp("int4") / "int4"
    one.run(export, plain, output, Layout(), quantization("int4_weights"), COMPRESSED, 10**9, True)
    return output


@pytest.mark.parametrize("message", BROKEN)
def test_tensors_that_do_not_fit_are_refused_by_name(int4, message):
    tensors = load((int4 / "model.safetensors").read_bytes())
    changed = tensors | {f"{Q}.{name}": value for name, value in BROKEN[message].items()}
    save_file({name: x for name, x in changed.items() if x is not None}, int4 / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        reader_of(int4)
    assert Q in str(raised.value)
    save_file(tensors, int4 / "model.safetensors")


def test_scales_that_are_no_numbers_are_refused_when_they_are_read(int4):
    from distill_nemo.models.families.pieces import Piece

    tensors = load((int4 / "model.safetensors").read_bytes())
    save_file(tensors | {f"{Q}.weight_scale": torch.full((64, 4), math.nan)}, int4 / "model.safetensors")
    with reader_of(int4) as reader, pytest.raises(ValueError, match="has scales that are not positive numbers"):
        reader.read(Piece(f"{Q}.weight", (slice(0, 1), slice(0, 64))))
    save_file(tensors, int4 / "model.safetensors")

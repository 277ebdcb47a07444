"""Weights in FP8 with block scales and in MXFP4, against formulas in numpy and against transformers' own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.tiny_models import write_hf

BLOCK = (24, 40)  # rows and columns; divides few tensors, and no tensor-parallel share
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
SLICES = [(0, 96, 0, 64), (48, 96, 0, 64), (0, 96, 32, 64), (23, 25, 39, 41), (95, 96, 63, 64)]


def fp8_values(codes):
    """Decode E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; subnormal at exponent 0."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes >> 7, -size, size)


def fp8_oracle(codes, scales, block):
    rows, columns = (np.arange(size) // each for size, each in zip(codes.shape[-2:], block, strict=True))
    return (fp8_values(codes) * scales.astype(np.float64)[..., rows, :][..., columns]).astype(np.float32)


def mxfp4_oracle(blocks, scales):
    """Decode E2M1 and E8M0: [E, out, groups, 16] bytes and [E, out, groups] exponents to [E, 32 * groups, out]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.int64)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    values = np.where(codes >> 3, -size, size) * 2.0 ** (scales[..., None].astype(np.float64) - 127)
    return values.reshape(*scales.shape[:2], -1).swapaxes(1, 2).astype(np.float32)


def random_codes(*shape, seed=0):
    """Return E4M3 codes of every kind but NaN."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes & 127 == 127, 0, codes)


def as_fp8(codes):
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def reader_of(path, tensors, **quantization):
    """Return a reader of tensors that are written to `path`."""
    from distill_nemo.models.checkpoints.hf_tensors import PieceReader, stored_tensors
    from distill_nemo.models.checkpoints.quantized import merge_scales
    from distill_nemo.models.stored_quantization import read_stored_quantization

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    found = read_stored_quantization({"quantization_config": FP8 | quantization}, "config.json")
    assert found is not None
    return PieceReader(merge_scales(path, stored_tensors(path), found))


@pytest.mark.parametrize("leading", [(), (3,)], ids=["matrix", "matrices of experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_fp8_is_dequantised_with_the_scales_of_its_blocks(tmp_path, leading, dtype):
    from distill_nemo.models.families.pieces import Piece

    codes = random_codes(*leading, 96, 64)
    scales = torch.rand(*leading, 4, 2, generator=torch.Generator().manual_seed(1)).to(dtype) / 64
    expected = torch.from_numpy(fp8_oracle(codes, scales.float().numpy(), BLOCK))
    with reader_of(tmp_path, {"w.weight": as_fp8(codes), "w.weight_scale_inv": scales}) as reader:
        for top, bottom, left, right in SLICES:
            index = (*(slice(1, 3) for _ in leading), slice(top, bottom), slice(left, right))
            assert torch.equal(reader.read(Piece("w.weight", index)), expected[index])


def test_fp8_is_dequantised_as_transformers_does(tmp_path):
    """Transformers derives blocks from the shapes of both tensors, so they must divide."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip("transformers 4 dequantises on a GPU only")
    from distill_nemo.models.families.pieces import Piece

    values, scales = as_fp8(random_codes(96, 64)), torch.rand(4, 2) / 64
    whole = Piece("w.weight", (slice(0, 96), slice(0, 64)))
    tensors = {"w.weight": values, "w.weight_scale_inv": scales}
    with reader_of(tmp_path, tensors, weight_block_size=[24, 32]) as reader:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            theirs = fp8.Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)
            assert torch.equal(reader.read(whole).to(dtype), theirs)


def test_a_slice_of_mxfp4_is_dequantised_with_the_exponents_of_its_groups(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from distill_nemo.models.families.pieces import Piece

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8)
    scales = random.integers(100, 150, (3, 10, 2), dtype=np.uint8)
    scales[0, 0] = 0, 250  # the smallest; close to the largest that gives numbers
    expected = torch.from_numpy(mxfp4_oracle(blocks, scales))
    assert torch.equal(expected, convert_moe_packed_tensors(*map(torch.from_numpy, (blocks, scales))).float())
    tensors = {
        "experts.down_proj_blocks": torch.from_numpy(blocks),
        "experts.down_proj_scales": torch.from_numpy(scales),
    }
    with reader_of(tmp_path, tensors, quant_method="mxfp4") as reader:
        for inputs, outputs in (
            (slice(0, 64), slice(0, 10)),
            (slice(31, 33), slice(3, 7)),
            (slice(40, 60), slice(1, 10, 2)),
        ):
            index = slice(0, 2), inputs, outputs
            assert torch.equal(reader.read(Piece("experts.down_proj", index)), expected[index])
        transposed = Piece("experts.down_proj", (slice(1, 2), slice(0, 64), slice(1, 10, 2)), axes=(2, 1))
        assert torch.equal(reader.read(transposed), expected[1, :, 1::2].T)


def test_only_the_scales_of_touched_blocks_are_read():
    from distill_nemo.models.checkpoints.quantized import read_quantized
    from distill_nemo.models.sources import Scales, StoredTensor

    requested = {}

    def read(file, name, index):
        requested[name] = index
        return torch.zeros([part.stop - part.start for part in index], dtype=torch.uint8)

    scales = Scales(Path("b"), (128, 128))
    read_quantized(
        read, "w", StoredTensor(Path("a"), "F8_E4M3", (512, 512), scales), (slice(200, 300), slice(256, 384))
    )
    assert requested == {"w": (slice(200, 300), slice(256, 384)), "w_scale_inv": (slice(1, 3), slice(2, 3))}
    requested.clear()
    index = slice(4, 5), slice(40, 64), slice(0, 8)
    read_quantized(read, "e", StoredTensor(Path("a"), "MXFP4", (8, 512, 512), scales), index)
    touched = slice(4, 5), slice(0, 8), slice(1, 2)
    assert requested == {"e_blocks": (*touched, slice(0, 16)), "e_scales": touched}


def write_fp8(path, family="qwen3", **quantization):
    """Write a tiny model whose linear layers are in FP8, and beside it the same, dequantised by the formula."""
    plain = write_hf(path.with_name(path.name + "_plain"), family)
    path.mkdir()
    tensors, dequantised = load_file(f"{plain}/model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            values, scales = quantise(tensor, (FP8 | quantization)["weight_block_size"])
            tensors |= {name: values, f"{name}_scale_inv": scales}
            codes = values.view(torch.uint8).numpy()
            dequantised[name] = torch.from_numpy(fp8_oracle(codes, scales.numpy(), BLOCK))
    save_file(tensors, path / "model.safetensors")
    config = json.loads(Path(plain, "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": FP8 | quantization}))
    save_file(load_file(f"{plain}/model.safetensors") | dequantised, f"{plain}/model.safetensors")
    return str(path), plain


def quantise(tensor, block):
    """Return E4M3 values and the scales by which they are multiplied."""
    rows, columns = (torch.arange(size) // each for size, each in zip(tensor.shape, block, strict=True))
    scales = torch.zeros(rows[-1] + 1, columns[-1] + 1)
    scales.index_put_((rows[:, None].expand_as(tensor), columns.expand_as(tensor)), tensor.abs() / 448, accumulate=True)
    return (tensor / scales[rows][:, columns]).to(torch.float8_e4m3fn), scales


def exported(path, output, layout):
    """Import at a layout and export again. Return the weights of this rank."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints.export_files import export_files
        from distill_nemo.models.checkpoints.write_safetensors import write_weights
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.models.source_check import check_source

        student = resolve(StudentConfig(checkpoint=path))
        model = model_provider(student=student, parallelism=layout.config())
        Path(output).mkdir(exist_ok=True)
        write_weights([model], student, Path(output))
        config = export_files(student, torch.float32, Path(path), None).config
    if layout == Layout():
        check_source(student)
    return {name: tensor.data.clone() for name, tensor in model.named_parameters()}, config


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["one process", "TP=2"])
def test_an_fp8_directory_is_the_same_model_as_its_dequantised_copy(tmp_path, one, two, layout):
    path, plain = write_fp8(tmp_path / "fp8")
    group = one if layout == Layout() else two
    of_fp8, of_plain = (group.run(exported, each, each + "_out", layout) for each in (path, plain))
    for (weights, config), (expected, expected_config) in zip(of_fp8, of_plain, strict=True):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        assert config == expected_config, "an export is not quantised"
    written, expected = (load_file(f"{each}_out/model.safetensors") for each in (path, plain))
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in written)


def edited(path, edit):
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN = {
    f"{Q} is quantised, but {Q}_scale_inv is missing": lambda t: t.pop(f"{Q}_scale_inv"),
    f"{Q}_scale_inv is F32 (4, 2), must be F32 or BF16 (3, 2)": lambda t: t.update({Q: t[Q][:72].clone()}),
    f"{Q}_scale_inv is F16 (4, 2), must be F32 or BF16": lambda t: t.update(
        {f"{Q}_scale_inv": t[f"{Q}_scale_inv"].half()}
    ),
    f"{Q} has shape (96, 40), needs (96, 64)": lambda t: t.update(
        {Q: t[Q][:, :40].clone(), f"{Q}_scale_inv": t[f"{Q}_scale_inv"][:, :1].clone()}
    ),
    "extra: more_scale_inv (1,)": lambda t: t.update({"more_scale_inv": torch.ones(1)}),
    f"{Q} is F8_E5M2": lambda t: t.update({Q: t[Q].float().to(torch.float8_e5m2)}) or t.pop(f"{Q}_scale_inv"),
    "model.norm.weight is quantised, but model.norm.weight_scale_inv is missing": lambda t: t.update(
        {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_scales_that_do_not_fit_are_refused_by_name(tmp_path, message):
    from distill_nemo.models.resolve import resolve

    path, _ = write_fp8(tmp_path / "fp8")
    edited(Path(path), BROKEN[message])
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(StudentConfig(checkpoint=path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a_blocks": (2, 4, 1, 16)}, "a is quantised, but a_scales is missing"),
        ({"a_blocks": (2, 4, 1, 8), "a_scales": (2, 4, 1)}, "a_blocks is U8 (2, 4, 1, 8), must be U8 (2, 4, 1, 16)"),
        ({"a_blocks": (2, 4, 1, 16), "a_scales": (2, 4, 2)}, "a_scales is U8 (2, 4, 2), must be U8 (2, 4, 1)"),
        ({"a_blocks": (4, 1, 16), "a_scales": (4, 1)}, "a_blocks (4, 1, 16) must have 4 dimensions"),
        ({"a_blocks": (2, 4, 1, 16), "a_scales": (2, 4, 1), "a": (1,)}, "and a must not be stored too"),
        ({"b.c.a_blocks": (2, 4, 1, 16), "b.c.a_scales": (2, 4, 1)}, "modules_to_not_convert lists its module"),
    ],
)
def test_blocks_and_scales_of_mxfp4_that_do_not_fit_are_refused_by_name(tmp_path, tensors, message):
    tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in tensors.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        reader_of(tmp_path, tensors, quant_method="mxfp4", modules_to_not_convert=["*.c"])


@pytest.mark.parametrize("listed", ["model.layers.0.self_attn", "q_proj", "model.layers.*.self_attn.q_proj", "model"])
def test_a_quantised_weight_in_a_module_that_is_not_to_be_is_refused(tmp_path, listed):
    """Transformers would multiply with its values, without scales, on a GPU."""
    from distill_nemo.models.resolve import resolve

    path, _ = write_fp8(tmp_path / "fp8", modules_to_not_convert=["lm_head", listed])
    with pytest.raises(ValueError, match=r"is quantised, but modules_to_not_convert lists its module"):
        resolve(StudentConfig(checkpoint=path))


def test_modules_that_are_not_quantised_may_be_listed(tmp_path):
    from distill_nemo.models.resolve import resolve

    listed = ["lm_head", "model.layers.0.input_layernorm", "proj", "model.layers.*.self_attn.q_norm", "model.layers.*"]
    path, _ = write_fp8(tmp_path / "fp8", modules_to_not_convert=listed[:-1])
    assert resolve(StudentConfig(checkpoint=path)).num_layers == 4


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config with quant_method 'awq' is not supported"),
        ({"quant_method": "gptq", "bits": 4}, "dequantise its weights first"),
        ({"quant_method": None, "load_in_4bit": True}, "quant_method must be a string"),
        ({"load_in_4bit": True}, "quantization_config with quant_method None is not supported"),
        (FP8 | {"activation_scheme": "static"}, "with activation_scheme 'static' is not supported"),
        (FP8 | {"fmt": "e5m2"}, "with fmt 'e5m2' is not supported"),
        (FP8 | {"scale_fmt": "int"}, "with scale_fmt 'int' is not supported"),
        (FP8 | {"weight_block_size": None}, "with weight_block_size None is not supported"),
        (FP8 | {"weight_block_size": [0, 128]}, "with weight_block_size [0, 128] is not supported"),
        (FP8 | {"weight_block_size": [True, 128]}, "with weight_block_size [True, 128] is not supported"),
        (FP8 | {"weight_block_size": [10**400, 1]}, "with weight_block_size"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names or null"),
        (FP8 | {"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list of names or null"),
        ("fp8", "quantization_config must be an object or null"),
    ],
)
def test_other_quantisations_are_refused_by_name(stated, message):
    from distill_nemo.models.stored_quantization import read_stored_quantization

    with pytest.raises(ValueError) as raised:
        read_stored_quantization({"quantization_config": stated}, "m/config.json")
    assert message in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("absent", [{}, None])
def test_an_empty_quantization_config_is_none(absent):
    from distill_nemo.models.stored_quantization import read_stored_quantization

    assert read_stored_quantization({"quantization_config": absent}, "config.json") is None


def test_the_configs_of_the_hub_are_read():
    """quantization_config of DeepSeek-V3.1, of Qwen3-FP8 with fewer modules, and of gpt-oss-20b."""
    from distill_nemo.models.stored_quantization import read_stored_quantization

    stated = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    deepseek = read_stored_quantization({"quantization_config": stated | {"scale_fmt": "ue8m0"}}, "")
    assert deepseek is not None and deepseek.block == (128, 128) and not deepseek.leaves_plain("lm_head")
    listed = read_stored_quantization(
        {"quantization_config": {**stated, "modules_to_not_convert": ["gate", "lm_head"]}}, ""
    )
    assert listed is not None and listed.leaves_plain("model.layers.0.mlp.gate")
    assert not listed.leaves_plain("model.layers.0.mlp.gate_proj")
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    oss = read_stored_quantization(
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": names}}, ""
    )
    assert oss is not None and oss.leaves_plain("model.layers.23.self_attn.q_proj")
    assert not oss.leaves_plain("model.layers.23.mlp.experts")

"""Directories that ModelOpt's own exporter wrote are read as numpy reads their bytes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import StudentConfig
from tests.distillation import Layout
from tests.modelopt_files import PRESETS, dequantised, write_modelopt
from tests.tiny_models import write_hf
from tests.unit.models.test_quantized_sources import exported

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("modelopt") / "plain", layers=2)


@pytest.fixture(scope="module", params=PRESETS)
def source(request, plain):
    return Path(write_modelopt(plain, Path(plain).with_name(request.param), request.param))


@pytest.fixture
def nvfp4(plain, tmp_path):
    path = Path(plain).with_name("nvfp4")
    if not path.is_dir():
        write_modelopt(plain, path, "nvfp4")
    return shutil.copytree(path, tmp_path / "nvfp4")


def reader_of(path):
    from distill_nemo.models.checkpoints.hf_tensors import PieceReader
    from distill_nemo.models.resolve import resolve

    found = resolve(StudentConfig(checkpoint=str(path))).source
    assert found is not None
    return PieceReader(found.tensors)


def test_whole_tensors_and_slices_are_dequantised_as_numpy_does(source, plain):
    from distill_nemo.models.families.pieces import Piece

    expected, original = dequantised(source)[0], load_file(f"{plain}/model.safetensors")
    assert expected.keys() == original.keys()
    with reader_of(source) as reader:
        for name, array in expected.items():
            whole = tuple(slice(0, size) for size in array.shape)
            assert torch.equal(reader.read(Piece(name, whole)), torch.from_numpy(array)), name
        for top, bottom, left, right in ((0, 64, 0, 64), (31, 33, 15, 49), (1, 2, 0, 1), (63, 64, 33, 64)):
            index, array = (slice(top, bottom), slice(left, right)), expected[f"{Q}.weight"]
            assert torch.equal(reader.read(Piece(f"{Q}.weight", index)), torch.from_numpy(array[index].copy()))
    apart = np.linalg.norm(expected[f"{Q}.weight"] - original[f"{Q}.weight"].numpy())
    assert 1e-4 < apart / original[f"{Q}.weight"].norm() < 0.2, "the oracle decodes it, or it is not quantised"


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["one process", "TP=2"])
def test_it_is_the_same_model_as_its_dequantised_copy(source, plain, one, two, tmp_path, layout):
    copy, group = shutil.copytree(plain, tmp_path / "copy"), one if layout == Layout() else two
    tensors = {name: torch.from_numpy(array.copy()) for name, array in dequantised(source)[0].items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    outputs = (group.run(exported, str(each), str(tmp_path / f"{i}"), layout) for i, each in enumerate((source, copy)))
    for (weights, config), (expected, _) in zip(*outputs, strict=True):
        assert weights.keys() == expected.keys() and "quantization_config" not in config
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_an_older_directory_has_only_hf_quant_config(nvfp4):
    config = json.loads((nvfp4 / "config.json").read_text())
    del config["quantization_config"]
    (nvfp4 / "config.json").write_text(json.dumps(config))
    with reader_of(nvfp4) as reader:
        assert reader.stored[f"{Q}.weight"].shape == (64, 64)
    (nvfp4 / "hf_quant_config.json").unlink()
    with pytest.raises(ValueError, match=r"weights must be BF16, .* is U8"):
        reader_of(nvfp4)


def edited(path, **changes):
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        tensors[f"{Q}.{name}"] = value
    save_file({name: x for name, x in tensors.items() if x is not None}, path / "model.safetensors")


BROKEN = {
    "weight_scale is missing": {"weight_scale": None},
    "weight_scale_2 is missing": {"weight_scale_2": None},
    "weight_scale is F8_E4M3 (64, 3), must be F8_E4M3 (64, 4)": {
        "weight_scale": torch.ones(64, 3).to(torch.float8_e4m3fn)
    },
    "weight_scale has 3 groups, which do not divide 32 columns": {"weight_scale": torch.ones(64, 3)},
    "weight_scale_2 is F32 (2,), must be F32 () or (1,)": {"weight_scale_2": torch.ones(2)},
    "input_scale is BF16 (), must be F32 () or (1,)": {"input_scale": torch.tensor(1.0).bfloat16()},
    "a quantised weight must have 2 dimensions": {"weight": torch.zeros(1, 64, 32, dtype=torch.uint8)},
    "weight has shape (64, 32), needs (64, 64)": {
        "weight": torch.zeros(64, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn),
    },
    "extra: model.layers.0.self_attn.q_proj.pre_quant_scale (64,)": {"pre_quant_scale": torch.ones(64)},
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_scales_that_do_not_fit_are_refused_by_name(nvfp4, message):
    edited(nvfp4, **BROKEN[message])
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        reader_of(nvfp4)
    assert Q in str(raised.value)


NAN, INFINITY = float("nan"), float("inf")
NO_SCALES = [("weight_scale", x) for x in (0.0, -1.0, NAN)] + [
    ("weight_scale_2", x) for x in (0.0, -1.0, NAN, INFINITY)
]


@pytest.mark.parametrize(("name", "wrong"), NO_SCALES)
def test_scales_that_are_not_positive_are_refused_when_they_are_read(nvfp4, name, wrong):
    from distill_nemo.models.families.pieces import Piece

    scales = load_file(nvfp4 / "model.safetensors")[f"{Q}.{name}"].float()
    scales.view(-1)[-1] = wrong
    edited(nvfp4, **{name: scales if name == "weight_scale_2" else scales.to(torch.float8_e4m3fn)})
    whole = Piece(f"{Q}.weight", (slice(0, 64), slice(0, 64)))
    with reader_of(nvfp4) as reader:
        if (name, wrong) == ("weight_scale", 0.0):
            assert (reader.read(whole)[-1, -16:] == 0).all(), "a block of tiny values"
            return
        with pytest.raises(ValueError, match=f"{Q}.weight has scales that are not positive numbers"):
            reader.read(whole)


@pytest.mark.parametrize(
    ("ignored", "refused"), [([Q], True), (["model.layers.0*"], True), (["*q_norm", "q_proj"], False)]
)
def test_a_quantised_weight_in_a_module_that_is_not_to_be_is_refused(nvfp4, ignored, refused):
    config = json.loads((nvfp4 / "config.json").read_text())
    config["quantization_config"]["ignore"] = ignored
    (nvfp4 / "config.json").write_text(json.dumps(config))
    if not refused:
        reader_of(nvfp4)
        return
    with pytest.raises(ValueError, match="is quantised, but ignore lists its module"):
        reader_of(nvfp4)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_algo": "NVFP4_SVD"}, "quantization_config with quant_algo 'NVFP4_SVD' is not supported"),
        ({}, "quantization_config with quant_algo None is not supported"),
        ({"quant_algo": 4}, "quant_algo must be a string"),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, "ignore must be a list of names or null"),
        ({"quant_algo": "FP8", "ignore": ["*"] * 2 + [f"{i}*" for i in range(1000)]}, "ignore must be at most 1,000"),
    ],
)
def test_other_formats_of_modelopt_are_refused_by_name(stated, message):
    from distill_nemo.models.stored_quantization import read_stored_quantization

    with pytest.raises(ValueError) as raised:
        read_stored_quantization({"quantization_config": {"quant_method": "modelopt", **stated}}, "m/config.json")
    assert message in str(raised.value) and len(str(raised.value)) < 600


def test_a_tie_between_two_values_of_four_bits_becomes_the_even_code():
    from distill_nemo.models.checkpoints.file_formats import e2m1_codes, e2m1_values

    values = torch.arange(-2240, 2241) / 320  # every middle is among them
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    apart = np.abs(values.abs().numpy().astype(np.float64)[:, None] - grid)
    nearest = apart == apart.min(axis=1, keepdims=True)
    even = np.arange(8) % 2 == 0
    chosen = np.where(nearest.sum(1) > 1, (nearest & even).argmax(1), nearest.argmax(1))
    assert (nearest.sum(1) > 1).sum() == 14
    expected = torch.from_numpy(grid[chosen].astype(np.float32)).copysign(values)
    assert torch.equal(e2m1_values(e2m1_codes(values)), expected)


@pytest.mark.parametrize("layout", ["fp8", "nvfp4", "int8", "int4_rows", "int4_columns"])
def test_what_is_packed_is_unpacked(layout):
    from distill_nemo.models.checkpoints.file_formats import E2M1, pack, unpack

    numbers = {"fp8": [-448, -0.0, 2.0**-9, 448], "nvfp4": E2M1, "int8": range(-128, 128)}
    values = numbers.get(layout, range(-8, 8))
    row = torch.tensor([*values], dtype=torch.float32).repeat(4)
    rows = torch.stack([row[torch.randperm(len(row))] for _ in range(4)])
    assert torch.equal(unpack(pack(rows, layout), layout), rows)

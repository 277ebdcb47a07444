"""Directories in ModelOpt's unified Hugging Face format: written by ModelOpt's own exporter, and read by numpy alone.

`dequantised` is the oracle: from the bytes of the files, it shares no code with the package, ModelOpt or safetensors.
"""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

PRESETS = {
    "fp8": "FP8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4_weights": "W4A16_NVFP4_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4_weights": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}
GROUP = 16  # columns of an INT4 scale; ModelOpt's 128 are more than tiny models have
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def write_modelopt(plain, output, preset):
    """Quantise a directory by its largest values and export it, both by ModelOpt. Return its path."""
    import modelopt
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    if Version(modelopt.__version__) < Version("0.47"):
        pytest.skip("it needs a GPU for NVFP4, and names other layers plain")
    config = copy.deepcopy(getattr(mtq, PRESETS[preset]))
    for rule in config["quant_cfg"]:
        if (rule.get("cfg") or {}).get("block_sizes", {}).get(-1) == 128:
            rule["cfg"]["block_sizes"][-1] = GROUP
    tokens = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        mtq.quantize(model, config, lambda model: model(tokens))
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=str(output))
    return str(output)


def stored(directory):
    """Return {name: (dtype, array)} of all files; of bytes where numpy has no such dtype."""
    kinds = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8, "BF16": np.uint16}
    kinds |= {"I32": np.int32, "I64": np.int64}
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                array = np.frombuffer(content[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
                found[name] = entry["dtype"], array
    return found


def dequantised(directory):
    """Return every weight in fp32 and the scale of each module's input, as `hf_quant_config.json` describes them."""
    stated = json.loads(Path(directory, "hf_quant_config.json").read_text())["quantization"]
    tensors, excluded = stored(directory), stated["exclude_modules"]
    weights, inputs = {}, {}
    for name, (dtype, array) in tensors.items():
        module, _, end = name.rpartition(".")
        if end == "input_scale":
            inputs[module] = float(array)
        elif end in ("weight", "bias"):
            plain = dtype in ("F32", "BF16")
            assert plain or module not in excluded
            weights[name] = plain_values(dtype, array) if plain else weight(module, tensors, stated)
    return weights, inputs


def plain_values(dtype, array):
    return array if dtype == "F32" else (array.astype(np.uint32) << 16).view(np.float32)


def weight(module, tensors, stated):
    """Return code * scale of a module's weight."""
    (_, codes), (_, scale) = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    algorithm = stated["quant_algo"]
    if algorithm == "FP8":
        return e4m3(codes) * np.float32(scale)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return codes.astype(np.float32) * scale[:, None]
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        scales = e4m3(scale) * np.float32(tensors[f"{module}.weight_scale_2"][1])
        values = np.empty((codes.shape[0], codes.shape[1] * 2), np.float32)
        values[:, 0::2], values[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
        return values * np.repeat(scales, stated["group_size"], axis=1)
    assert algorithm == "W4A16_AWQ"
    values = np.empty((codes.shape[0] * 2, codes.shape[1]), np.float32)
    for first, nibble in enumerate((codes & 15, codes >> 4)):
        values[first::2] = nibble.astype(np.float32) - 16 * (nibble > 7)
    return values * np.repeat(scale, stated["group_size"], axis=1)


def e4m3(codes):
    """Decode E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; subnormal at exponent 0."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.float32), (codes & 7).astype(np.float32)
    size = np.where(exponent == 0, mantissa * np.float32(2.0**-9), (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes >> 7 != 0, -size, size).astype(np.float32)

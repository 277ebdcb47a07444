"""Directories in the format of compressed-tensors: read by numpy alone, and written by the library itself.

`parts` and `dequantised` are the oracle, from the bytes of the files: no code of the package or the library.
"""

import json
from pathlib import Path

import numpy as np

from tests.modelopt_files import E2M1, e4m3, plain_values, stored


def parts(directory):
    """Return {module: (values without their scales, scales of each value)} of the quantised weights."""
    tensors = stored(directory)
    [group] = json.loads(Path(directory, "config.json").read_text())["quantization_config"]["config_groups"].values()
    weights, found = group["weights"], {}
    for name, (dtype, array) in tensors.items():
        module, _, end = name.rpartition(".")
        if end == "weight_packed" or (end == "weight" and dtype in ("F8_E4M3", "I8")):
            values = {"weight": plain_codes, "weight_packed": unpacked}[end](dtype, array)
            found[module] = values, _scales(tensors, module, values.shape, weights)
            shape = tensors.get(f"{module}.weight_shape")
            assert (shape is not None) == (dtype == "I32") and (shape is None or tuple(shape[1]) == values.shape)
    return found


def plain_codes(dtype, array):
    return e4m3(array) if dtype == "F8_E4M3" else array.astype(np.float32)


def unpacked(dtype, array):
    """Decode two E2M1 a byte, or eight integers plus 8 an int32; the lowest bits are the first column."""
    if dtype == "U8":
        return np.stack([E2M1[array & 15], E2M1[array >> 4]], axis=-1).reshape(len(array), -1)
    words = array.astype(np.int64) & 0xFFFFFFFF
    return np.stack([(words >> (4 * i) & 15) - 8 for i in range(8)], axis=-1).reshape(len(array), -1).astype(np.float32)


def _scales(tensors, module, shape, weights):
    dtype, scale = tensors[f"{module}.weight_scale"]
    scale = e4m3(scale) if dtype == "F8_E4M3" else plain_values(dtype, scale)
    if weights["strategy"] == "tensor_group":
        scale = scale / tensors[f"{module}.weight_global_scale"][1]
    if weights["strategy"] == "tensor":
        assert scale.shape == (1,)
        return np.broadcast_to(scale, shape)
    assert weights["strategy"] != "channel" or scale.shape == (shape[0], 1)
    return np.repeat(scale, shape[1] // scale.shape[1], axis=1)


def dequantised(directory):
    """Return every weight in fp32."""
    found = {f"{module}.weight": values * scales for module, (values, scales) in parts(directory).items()}
    for name, (dtype, array) in stored(directory).items():
        if name.endswith(("weight", "bias")) and name not in found:
            found[name] = plain_values(dtype, array)
    return found


def write_compressed(plain, output, weights, inputs, dtype):
    """Quantise a directory by its largest values, and write it, both by the library. Return its path."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["re:.*lm_head"])
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    apply_quantization_config(model, config)
    for module in (module for module in model.modules() if hasattr(module, "weight_scale")):
        scheme, weight = module.quantization_scheme.weights, module.weight.data
        size = scheme.group_size or weight.shape[1]
        blocks = weight.unflatten(1, (-1, size))
        if scheme.strategy == "block":
            rows, columns = scheme.block_structure
            blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        low, high = (blocks.amin(-1), blocks.amax(-1)) if scheme.strategy != "tensor" else (weight.min(), weight.max())
        scale, zero_point = calculate_qparams(low, high, scheme)
        module.weight_scale.data = scale.to(weight.dtype)
        module.weight_zero_point.data = zero_point
        if inputs and not inputs.get("dynamic"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(output)
    compressor.update_config(output)
    return str(output)

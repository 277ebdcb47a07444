"""The device of a process: fp32 is fp32."""

import torch

from distill_nemo.runtime.device import setup_device


def precisions_after_tf32():
    """Return what a process multiplies and convolves fp32 with that was told to use TF32."""
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of NVIDIA's containers
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    setup_device.cache_clear()
    setup_device()
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_fp32_is_not_computed_in_tf32(one):
    assert one.run(precisions_after_tf32) == [("highest", False)]

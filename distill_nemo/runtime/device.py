"""Choice of the device, and the patches that let Megatron-Core 0.19 run on CPU and gloo.

Importing this module replaces nothing, and nothing is ever replaced if CUDA is available. `setup_device` does it, once,
and must run before `megatron` is imported, since Megatron annotates with `torch.cuda` classes at import.
"""

import functools
import importlib
import logging
import os
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@functools.cache
def setup_device() -> torch.device:
    """Choose this process's device and make Megatron-Core usable on it.

    Returns:
        `cuda:<LOCAL_RANK>` where CUDA is available, else `cpu`.

    Raises:
        RuntimeError: if there are more ranks than GPUs.
    """
    quiet_third_parties()
    # fp32 means fp32: NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1; torch convolves in TF32 by default
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.is_available():
        rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if rank >= count:
            raise RuntimeError(
                f"LOCAL_RANK={rank} has no GPU, since this process sees {count}: start as many ranks on a node as it "
                "has GPUs, and look at CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        return device
    _replace_cuda_by_cpu()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # 4 % of a step, and nothing reads such memory; torch makes this name at run time
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return torch.device("cpu")


def backend() -> str:
    """Return the collective backend for the device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name; `auto` is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def quiet_third_parties() -> None:
    """Silence warnings on which no user can act. Errors stay."""
    warnings.filterwarnings("ignore", module=r"(torch|megatron|modelopt|transformers|nemo_run)(\..*)?")
    # Warnings from C++ and from deprecated classes are attributed to our __torch_function__, so these are matched by
    # text. Megatron's optimizer reads `.grad` of views; its checkpoints use ShardedTensors; a barrier on GPUs asks
    # for the device that is already set.
    for text in (
        "pynvml",
        "torch_dtype",
        "Transformer Engine",
        "[Aa]pex",
        r"The \.grad attribute",
        "Please use DTensor",
        r"barrier\(\): using the device",
        "Using a non-tuple sequence",  # gated delta nets under context parallelism
    ):
        warnings.filterwarnings("ignore", message=f".*{text}")
    for name in ("megatron", "modelopt", "transformers", "torch.utils.cpp_extension", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _quiet_transformers()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class _Stream:
    """Stand-in for `torch.cuda.Stream`; CPU work is already in order."""

    def wait_stream(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _CudaMeansCpu(TorchFunctionMode):
    """Mode in which `device="cuda"` and `.to("cuda:0")` mean the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str in map(type, args):
            args = tuple("cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg for arg in args)
        if kwargs is None:
            return func(*args)
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_CUDA_MEANS_CPU = _CudaMeansCpu()


def _replace_cuda_by_cpu() -> None:
    for owner, name, value in cpu_replacements():
        setattr(owner, name, value)
    _CUDA_MEANS_CPU.__enter__()


def cpu_replacements() -> list[tuple[Any, str, Any]]:
    """Return (owner, name, value) of every patch that Megatron-Core 0.19 needs.

    tests/unit/runtime/test_patches.py reverts each and checks that a run then fails.
    """
    cpu, cuda = torch.device("cpu"), torch.cuda
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    return [
        (cuda, "current_device", lambda: cpu),  # DDP buffers, optimizer and MoE put tensors there
        (cuda, "synchronize", lambda *a, **k: None),
        (cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state()),  # Megatron's RNG tracker forks this state
        (cuda, "current_stream", lambda *a, **k: _Stream()),
        (torch.Tensor, "cuda", lambda self, *a, **k: self),
        (torch.Tensor, "type", _type_as_on_cuda(torch.Tensor.type)),
        (random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),
        # Torch would queue every call until CUDA starts, 270 kB a step. Nothing here draws from those states.
        (random, "_set_cuda_rng_state", lambda *a, **k: None),
    ]


def _type_as_on_cuda(plain_type: Any) -> Any:
    """Return `Tensor.type` with the names of CUDA tensors, which `megatron.core.optimizer.clip_grads` asserts."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.Float", "torch.cuda.Float")

    return type_

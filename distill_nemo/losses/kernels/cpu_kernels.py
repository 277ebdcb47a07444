"""Kernels in C (`cpu_kernels.c`) for bf16 and fp32 logits on CPU, several times as fast as torch.

The machine's C compiler ($CC, cc, gcc or clang) builds them at first use, in about a second, into ~/.cache/distill_nemo
(or $XDG_CACHE_HOME). Without a compiler or a writable place, torch computes. Tokens are divided over
`torch.get_num_threads()` threads, which are torch's own if both use the same OpenMP. The number of threads does not
change a token's bits.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_nemo.losses.kernels.eager import LMGradient, add_lm_gradient

SOURCE = Path(__file__).with_suffix(".c")
# Strict floating point except for fused multiply-adds, so infinities and NaN are kept. Scheduling makes the
# exponentials of a loop overlap, which gcc otherwise leaves to the processor.
FLAGS = ["-O3", "-march=native", "-fschedule-insns", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = "-fopenmp", "-fopenmp-simd"  # the second, with one thread, if a compiler lacks OpenMP's library
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def can_take(*logits_SBv: Tensor) -> bool:
    """Return True on CPU for logits of one dtype and shape with contiguous columns, if the library is compiled."""
    kinds = {(x.device.type, x.dtype, x.shape) for x in logits_SBv}
    fits = len(kinds) == 1 and logits_SBv[0].device.type == "cpu" and logits_SBv[0].dtype in SUFFIXES
    return fits and all(x.stride(-1) == 1 for x in logits_SBv) and library() is not None


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """Replace `eager.kl_statistics`."""
    out = torch.empty(5, *p_logits_SBv.shape[:-1], dtype=torch.float32, device="cpu")
    _call("kl_statistics", (p_logits_SBv, q_logits_SBv), temperature, tuple(out.view(5, -1)))
    return out


def log_sum_exp(logits_SBv: Tensor, temperature: float) -> Tensor:
    """Replace the first two rows of `eager.kl_statistics`, with the same bits."""
    out = torch.empty(2, *logits_SBv.shape[:-1], dtype=torch.float32, device="cpu")
    _call("log_sum_exp", (logits_SBv,), temperature, tuple(out.view(2, -1)))
    return out


def softmax_gradient(
    logits_nv: Tensor,
    temperature: float,
    peak_n: Tensor,
    scale_n: Tensor,
    second: tuple[Tensor, Tensor] | None,
    column_nK: Tensor,
    value_nK: Tensor,
    out_nv: Tensor,
) -> Tensor:
    """Replace `eager.softmax_gradient`, for fp32."""
    other_peak_n, other_scale_n = (peak_n, torch.zeros_like(scale_n)) if second is None else second
    numbers_n = tuple(x.contiguous() for x in (peak_n, scale_n, other_peak_n, other_scale_n))
    _call("softmax_gradient", (logits_nv,), temperature, numbers_n, out_nv)
    return out_nv.scatter_add_(-1, column_nK, value_nK)


def forward_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    grad_SB: Tensor,
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
) -> Tensor:
    """Replace `Divergence.gradient` of `ForwardKL`."""
    numbers = *student_lse_2SB, *teacher_lse_2SB, grad_SB
    return _gradient("forward_kl_gradient", student_SBv, teacher_SBv, numbers, out_SBv, lm, temperature)


def reverse_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_peak_SB: Tensor,
    mean_SB: Tensor,
    grad_SB: Tensor,
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
) -> Tensor:
    """Replace `Divergence.gradient` of `ReverseKL`."""
    numbers = *student_lse_2SB, teacher_peak_SB, mean_SB, grad_SB
    return _gradient("reverse_kl_gradient", student_SBv, teacher_SBv, numbers, out_SBv, lm, temperature)


KERNELS = {
    "kl_statistics": kl_statistics,
    "log_sum_exp": log_sum_exp,
    "softmax_gradient": softmax_gradient,
    "forward_kl_gradient": forward_kl_gradient,
    "reverse_kl_gradient": reverse_kl_gradient,
}


def _gradient(
    name: str,
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    numbers_SB: tuple[Tensor, ...],
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
) -> Tensor:
    numbers_N = tuple(x.float().flatten().contiguous() for x in numbers_SB)
    _call(name, (student_SBv, teacher_SBv), temperature, numbers_N, out_SBv)
    if lm is not None:
        add_lm_gradient(student_SBv, lm, slice(None), out_SBv)
    return out_SBv


def _call(
    name: str, logits_SBv: tuple[Tensor, ...], temperature: float, numbers_N: tuple[Tensor, ...], *out_SBv: Tensor
) -> None:
    """Call `name(logits and their strides, rows, width, threads, T, numbers, out and its stride)`."""
    loaded = library()
    assert loaded is not None, "ask can_take first"
    function = getattr(loaded, f"{name}_{SUFFIXES[logits_SBv[0].dtype]}")
    logits_Nv, out_Nv = ([x.detach().flatten(0, -2) for x in tensors] for tensors in (logits_SBv, out_SBv))
    num_tokens, width = logits_Nv[0].shape
    logits, outs = ([a for x in xs for a in (_address(x), ctypes.c_long(x.stride(0)))] for xs in (logits_Nv, out_Nv))
    size = ctypes.c_long(num_tokens), ctypes.c_long(width), ctypes.c_int(torch.get_num_threads())
    function(*logits, *size, ctypes.c_float(temperature), *map(_address, numbers_N), *outs)


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@cache
def library() -> Any:
    """Return the compiled functions, or None if they cannot be built."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError, RuntimeError):  # RuntimeError: no home directory
        return None


def _compiled(compiler: str) -> Path:
    """Return the library for this source, compiler and processor. It is built aside and renamed, as ranks may race."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill_nemo"
    target = folder / f"cpu_kernels_{_fingerprint(compiler)}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "kernels.so"
            for openmp in OPENMP:
                command = [compiler, *FLAGS, openmp, "-shared", "-fPIC", "-o", str(built), str(SOURCE), "-lm"]
                result = subprocess.run(command, check=openmp == OPENMP[-1], capture_output=True, timeout=120)
                if result.returncode == 0:
                    break
            built.replace(target)
    return target


def _fingerprint(compiler: str) -> str:
    """Return a key of source, compiler and processor, as machines that share a home may differ in `-march=native`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    text = SOURCE.read_bytes() + version + "\n".join([*FLAGS, *OPENMP, *processor]).encode()
    return hashlib.sha256(text).hexdigest()[:16]

"""Errors of ranks, of which the user should see the first one alone."""

import pytest
import torch

from distill_nemo.runtime import errors


def test_a_rank_that_lost_its_connection_lets_rank_0_print_the_reason(monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    with pytest.raises(RuntimeError, match="closed by peer"), errors.errors_in_one_screen():
        raise RuntimeError("Connection closed by peer")  # not of this package, so its traceback is shown
    assert waited == [errors.RANK_0_SECONDS]


OF_GPU = (  # as torch, Triton and NCCL word it
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 10.00 MiB "
        "is free. See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call to "
        "CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    torch.distributed.DistBackendError("NCCL error: unhandled\nLast error:\nFailed to CUDA calloc async 608 bytes"),
)


@pytest.mark.parametrize("error", OF_GPU, ids=range(len(OF_GPU)))
def test_memory_of_a_gpu_that_runs_out_is_one_line_that_says_what_to_do(error, capsys):
    with pytest.raises(SystemExit), errors.errors_in_one_screen():
        raise error
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: the GPU's memory ran out ({str(error)[:20]}") and printed.count("\n") == 1
    assert "lower the micro batch size" in printed and "See documentation" not in printed


@pytest.mark.parametrize(
    ("take", "cause"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), " (DefaultCPUAllocator: can't allocate memory: you tried"),
        (lambda: bytearray(2**62), ":"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(take, cause, capsys):
    with pytest.raises(SystemExit), errors.errors_in_one_screen():
        take()
    printed = capsys.readouterr().err
    assert printed.startswith("error: this host's memory ran out") and cause in printed
    assert printed.count("\n") == 1 and "lower the micro batch size" in printed

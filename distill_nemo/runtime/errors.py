"""Errors as the user sees them. No torch."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator

RANK_0_SECONDS = 10.0  # that other ranks wait for rank 0 to print an error
# Of torch's allocator, of CUDA beside it, of its libraries, and of NCCL.
OF_GPU = re.compile(r"\bout of memory\b|CU\w+_STATUS_ALLOC_FAILED|Failed to CUDA (host )?[cm]alloc")


@contextlib.contextmanager
def errors_in_one_screen() -> Iterator[None]:
    """Print errors that this package raises as `error: ...` and exit with 1. Others keep their traceback.

    Under torchrun all ranks usually raise the same error, or lose their connection to one that did, and the first rank
    to end has the others killed. So rank 0 prints its error and the others wait. A rank that is still alive afterwards
    had an error of its own and prints that.
    """
    try:
        yield
    except (ValueError, RuntimeError, ArithmeticError, OSError, MemoryError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(RANK_0_SECONDS)
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        module = last.tb_frame.f_globals.get("__name__", "") if last else ""
        error = _explained(error)
        if not isinstance(error, OSError | MemoryError) and module.split(".")[0] not in ("distill_nemo", "recipes"):
            raise
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _explained(error: Exception) -> Exception:
    """Return an error of torch's or Python's allocators as a `MemoryError` that says what to do; others unchanged."""
    of_torch = str(error) if isinstance(error, RuntimeError) else ""
    if OF_GPU.search(of_torch):
        cause = of_torch.partition("\n")[0].partition(" See documentation")[0].rstrip(".")
        return MemoryError(
            f"the GPU's memory ran out ({cause}): lower the micro batch size or the sequence length, recompute "
            "activations, keep the teacher's layers on the host, or split the models over more GPUs; nemo distill plan "
            "says what takes how much"
        )
    if "DefaultCPUAllocator" not in of_torch and not isinstance(error, MemoryError):
        return error
    cause = re.sub(r"^\[enforce.*?(?=DefaultCPUAllocator)", "", str(error).partition("\n")[0])
    return MemoryError(
        f"this host's memory ran out{f' ({cause})' if cause else ''}: lower the micro batch size, the sequence length, "
        "the number of samples or the size of the models"
    )


def errors_of_a_rank() -> contextlib.AbstractContextManager[None]:
    """Return `errors_in_one_screen` under torchrun; in a caller's own process, a context that lets errors pass."""
    return errors_in_one_screen() if "TORCHELASTIC_RUN_ID" in os.environ else contextlib.nullcontext()

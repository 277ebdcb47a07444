"""Imports of torch, Megatron and what needs them, without the garbage collector. Light at import."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def megatron_imports() -> Iterator[None]:
    """Set up the device, then hold a process's imports of Megatron and of modules that import it.

    ```
    with megatron_imports():
        from distill_nemo.training.loop import Loop
    ```

    No module is garbage, so the collector is off meanwhile. What the process holds after its first imports of Megatron
    is frozen: each later collection would look at a million objects of modules. That is 2 of the 14 processor seconds
    of a tiny run.
    """
    first, enabled = "megatron.core" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        from distill_nemo.runtime.device import setup_device

        setup_device()  # before Megatron is imported
        yield
    finally:
        if enabled:
            gc.enable()
    if first:  # only once: later there may be models, which refer to themselves
        gc.freeze()

"""Errors as a user reads them. No torch."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

RANK_0_SECONDS = 10.0  # how long another rank's error waits for rank 0 to say it


@contextlib.contextmanager
def errors_in_one_screen() -> Iterator[None]:
    """Errors that this package raises are for the user: print `error: ...` and exit 1. Others keep their traceback.

    Under torchrun all ranks meet the same error, and the first one that ends has the others killed. So rank 0 speaks,
    and the others wait for that; one that is still alive afterwards had an error of its own, and says so.
    """
    try:
        yield
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        module = last.tb_frame.f_globals.get("__name__", "") if last else ""
        if not isinstance(error, OSError) and module.split(".")[0] not in ("distill_nemo", "recipes"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(RANK_0_SECONDS)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)

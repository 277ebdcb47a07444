"""A run's metrics in W&B. A server that is gone neither ends the run nor holds up its end."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

AT_THE_END = 30  # seconds to send what is left, as for MLflow; by default W&B tries for hours


def start_wandb(project: str, output_dir: Path, identifier: str) -> Any:
    """Return a run of W&B, one for all attempts at a run; without a connection, an offline one, to be sent later.

    Args:
        project: is made if there is none of this name.
        output_dir: keeps W&B's files, in `wandb`.
        identifier: of the run, the same for every attempt.

    Raises:
        ValueError: if W&B is not installed, or has no key, or a wrong one.
    """
    try:
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError
    except ImportError:
        raise ValueError(
            "logging.wandb_project is set, but wandb is missing: pip install distill-nemo[wandb]"
        ) from None
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(AT_THE_END))
    begin = partial(wandb.init, project=project, dir=output_dir, id=identifier, resume="allow")
    try:
        return begin()
    except (UsageError, AuthenticationError) as error:
        raise ValueError(
            f"logging.wandb_project is set, but W&B refuses: {error} Export WANDB_API_KEY where the ranks run, or "
            "WANDB_MODE=offline"
        ) from None
    except CommError as error:
        print(
            f"warning: W&B: {error}; the run goes on, and `wandb sync {output_dir}/wandb/offline-run-*` sends its "
            "metrics later",
            file=sys.stderr,
            flush=True,
        )
        wandb.teardown()  # else the id is in use
        return begin(mode="offline")

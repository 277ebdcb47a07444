"""A run's metrics in W&B. A server that is gone neither ends the run nor holds up its end."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

AT_THE_END = 30  # seconds to send what is left, as for MLflow; by default W&B tries for hours


def start_wandb(project: str, output_dir: Path, identifier: str, parameters: Mapping[str, Any]) -> Any:
    """Return a run of W&B, one for all attempts at a run; without a connection, an offline one, to be sent later.

    Args:
        project: is made if there is none of this name.
        output_dir: keeps W&B's files, in `wandb`, and names the run, unless WANDB_NAME does.
        identifier: of the run, the same for every attempt.
        parameters: nested, as W&B wants them; those that an earlier attempt has sent stay.

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
    name = os.environ.get("WANDB_NAME") or output_dir.resolve().name
    begin = partial(wandb.init, project=project, dir=output_dir, id=identifier, name=name, resume="allow")
    try:
        run = begin()
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
        run = begin(mode="offline")
    run.config.setdefaults(dict(parameters))
    return run

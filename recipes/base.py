"""Defaults that every recipe starts from."""

from typing import Any

import nemo_run as run

from distill_nemo.config import sections
from distill_nemo.training.entry import distill


def base(name: str) -> run.Partial:
    """Return a complete recipe with every default, which other recipes change."""
    parts: dict[str, Any] = {section: run.Config(cls) for section, cls in sections().items()}
    return run.Partial(distill, output_dir=f"runs/{name}", **parts)

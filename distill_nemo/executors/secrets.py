"""Tokens and passwords stay out of what is written down: batch scripts, manifests, logs, NeMo-Run's records."""

import re
from collections.abc import Iterable

_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE)_?KEY)$")
_ASSIGNED = re.compile(r"\b(\w+)=(?=[^\s$`])(?![\"'][$`])")  # in a line of shell, to something other than a variable


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds one: HF_TOKEN, WANDB_API_KEY."""
    return bool(_SECRET.search(name.upper()))


def refuse_secrets(env: Iterable[str], setup: Iterable[str], advice: str) -> None:
    """Refuse a secret among the names in `run.executor.env`, or its value in a line of `run.executor.setup`.

    Raises:
        ValueError: naming the variable, never its value, with the `advice`.
    """
    for field, names in (("env", env), ("setup", (name for line in setup for name in _ASSIGNED.findall(line)))):
        for name in names:
            if is_secret(name):
                raise ValueError(f"run.executor.{field}: the value of {name} would be written down in clear; {advice}")

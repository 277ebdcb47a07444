"""Tokens and passwords stay out of what is written down: batch scripts, manifests, logs, NeMo-Run's records."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

LEAST = 8  # characters of a value that is looked for: shorter ones are in everything
# GOOGLE_APPLICATION_CREDENTIALS is the path of a file.
_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<!GOOGLE_APPLICATION_)CREDENTIALS?|(?<!PUBLIC_)(?<=\w)KEY"
    r"|(^|_)(PASS|PAT|AUTH))$"
)
# In a line of shell, a variable or an option, set to something other than a variable.
_ASSIGNED = re.compile(r"(?<![\w-])-*(\w[\w-]*)=(?=[^\s$`])(?![\"'][$`])")


def is_secret(name: str) -> bool:
    """Return True if an environment variable of this name holds a secret: HF_TOKEN, WANDB_API_KEY."""
    return bool(_SECRET.search(name.upper().replace("-", "_")))


def refuse_secrets(given: Mapping[str, Any], advice: str) -> None:
    """Refuse the value of a secret anywhere in the fields of an executor.

    It is known by the name of what it is set to, or because a variable of such a name has it in this environment.

    Raises:
        ValueError: naming the field and the variable, never the value, with the `advice`, where NAME is the variable.
    """
    held = {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= LEAST}
    for field, value in given.items():
        for variable, text in _texts({field: value}):
            names = [variable, *_ASSIGNED.findall(text)] if text else []
            found = [name for name in names if is_secret(name)] + [name for name in held if held[name] in text]
            if found:
                raise ValueError(
                    f"run.executor.{field}: the value of {found[0]} would be written down in clear; "
                    + advice.replace("NAME", found[0])
                )


def _texts(value: Any, variable: str = "") -> Iterator[tuple[str, str]]:
    """Every text within `value`, and the environment variable that it is the value of, if it is one's."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, str):
        yield variable, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key in ("env", "env_vars") and isinstance(each, Mapping):
                yield from ((str(name), str(text)) for name, text in each.items())
            else:  # Kubernetes says {"name": VARIABLE, "value": TEXT}
                yield from _texts(each, str(value.get("name", "")) if key == "value" else "")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)

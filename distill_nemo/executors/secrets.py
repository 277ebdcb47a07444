"""Keep tokens and passwords out of batch scripts, manifests, logs and NeMo-Run's records."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

MIN_LENGTH = 8  # characters of a secret that is searched for; shorter ones occur in any text
# GOOGLE_APPLICATION_CREDENTIALS holds a path, not a secret.
_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<!GOOGLE_APPLICATION_)CREDENTIALS?|(?<!PUBLIC_)(?<=\w)KEY"
    r"|(^|_)(PASS|PAT|AUTH))$"
)
# A variable or an option in a line of shell that is set to something other than a variable.
_ASSIGNED = re.compile(r"(?<![\w-])-*(\w[\w-]*)=(?=[^\s$`])(?![\"'][$`])")


def is_secret(name: str) -> bool:
    """Return True if an environment variable of this name holds a secret: HF_TOKEN, WANDB_API_KEY."""
    return bool(_SECRET.search(name.upper().replace("-", "_")))


def refuse_secrets(given: Mapping[str, Any], advice: str) -> None:
    """Refuse a secret anywhere in the fields of an executor.

    A value is a secret if the variable or option that it is assigned to is named like one, or if a variable of this
    environment that is named like one has the same value.

    Raises:
        ValueError: naming the field and the variable, never the value, with the `advice`, where NAME is the variable.
    """
    exported = {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= MIN_LENGTH}
    for field, value in given.items():
        for variable, text in _texts({field: value}):
            names = [variable, *_ASSIGNED.findall(text)] if text else []
            found = [name for name in names if is_secret(name)]
            found += [name for name, secret in exported.items() if secret in text]
            if found:
                raise ValueError(
                    f"run.executor.{field}: the value of {found[0]} would be stored in plain text; "
                    + advice.replace("NAME", found[0])
                )


def _texts(value: Any, variable: str = "") -> Iterator[tuple[str, str]]:
    """Yield each string within `value`, after the name of the environment variable that it sets ("" if none)."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, str):
        yield variable, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key in ("env", "env_vars") and isinstance(each, Mapping):
                yield from ((str(name), str(text)) for name, text in each.items())
            else:  # Kubernetes writes {"name": VARIABLE, "value": TEXT}
                yield from _texts(each, str(value.get("name", "")) if key == "value" else "")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)

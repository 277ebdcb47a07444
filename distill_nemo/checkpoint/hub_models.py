"""Names on the Hugging Face Hub in the configs of jobs: pinned to commits, and replaced by directories. No torch.

The launcher pins and downloads if the ranks see its disk. Each rank then replaces the names, and downloads itself what
its cache lacks, as on Kubernetes. Records keep the names, with their commits.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from distill_nemo.checkpoint.directory import checkpoint_root, read_record
from distill_nemo.config import RunConfig, StoreConfig
from distill_nemo.hub import HubName, at_commit, description_of, directory_of, hub_name, recorded_name
from distill_nemo.models.sources import candidates
from distill_nemo.runtime.files import read_object_if_any

TOKENIZERS = ("data.tokenizer", "tokenizer")
FIELDS = (
    "student.checkpoint",
    "teacher.checkpoint",
    "model",
    "baseline",
    "teacher",
    *TOKENIZERS,
)  # of any job's config


def pinned[C](config: C, show: Callable[[str], None] = print) -> C:
    """Return a copy of a config whose names on the hub have commits. A job that goes on keeps those that it began with.

    Args:
        config: of a job.
        show: is given a line for each name that had no commit.

    Raises:
        ValueError: from `hub.at_commit`, naming the field.
    """
    begun_with = _recorded(config)

    def pin(field: str, value: str) -> str:
        name = hub_name(value)
        return str(_pinned(field, name, hub_name(str(begun_with.get(field))), show)) if name else value

    return _mapped(config, pin)


def _pinned(field: str, name: HubName, begun: HubName | None, show: Callable[[str], None]) -> HubName:
    if begun is None or name != HubName(begun.repository):
        found = at_commit(name)
        if found != name:
            show(f"{field}: {name} is at {found.revision}")
        return found
    try:
        found = at_commit(name)
    except ValueError:  # the branch is not needed
        found = begun
    if found == begun:
        show(f"{field}: {name} is at {begun.revision}")
    else:
        show(f"{field}: {name} is at {found.revision} now; the job goes on with {begun.revision}, as it began")
    return begun


def downloaded[C](config: C) -> C:
    """Return a copy of a config with directories in place of names on the hub, after downloads of what they lack.

    Raises:
        ValueError: from `hub.directory_of`, naming the field.
    """
    return _mapped(config, lambda field, value: directory_of(value, weights=field not in TOKENIZERS))


def on_this_machine[C](config: C) -> C:
    """Do both on a rank, each of which calls it: pin the names that the launcher did not, and download."""
    rank_0 = os.environ.get("RANK", "0") == "0"
    return downloaded(pinned(config, print if rank_0 else lambda _: None))


def described[C](config: C) -> C:
    """Return a copy of a config with directories in place of names on the hub, for a plan: without weights.

    Raises:
        ValueError: from `hub.description_of`, naming the field.
    """
    return _mapped(config, lambda _, value: description_of(value))


def named[C](config: C) -> C:
    """Return a copy of a config with names on the hub in place of directories in its cache, for records."""
    return _mapped(config, lambda _, value: recorded_name(value))


def models_of(config: object) -> dict[str, str]:
    """Return the models and tokenizers that a config names, by field."""
    found = {field: _owner(config, field).get(field.rpartition(".")[2]) for field in FIELDS}
    return {field: value for field, value in found.items() if isinstance(value, str)}


def _owner(config: object, field: str) -> dict[str, Any]:
    """Return the fields of the section that a field is in; empty if the config has no such section."""
    section = field.rpartition(".")[0]
    owner = vars(config).get(section) if section else config
    return vars(owner) if is_dataclass(owner) else {}


def _mapped[C](config: C, function: Callable[[str, str], str]) -> C:
    """Return a copy of a config with a function applied to each of its models and tokenizers."""
    config = deepcopy(config)
    for field, value in models_of(config).items():
        try:
            _owner(config, field)[field.rpartition(".")[2]] = function(field, value)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return config


def _recorded(config: object) -> Mapping[str, Any]:
    """Return the names with which the job in the output directory began, by field; empty if none can be read."""
    if isinstance(config, StoreConfig):
        with contextlib.suppress(ValueError):
            manifest = read_object_if_any(Path(config.output) / "manifest.json")
            return {"teacher.checkpoint": manifest.get("checkpoint"), "data.tokenizer": manifest.get("tokenizer")}
    for step in candidates(checkpoint_root(config.output_dir)) if isinstance(config, RunConfig) else ():
        with contextlib.suppress(ValueError):
            record = read_record(step)
            sections = [field.split(".") for field in FIELDS if "." in field]
            return {f"{section}.{name}": (record[section] or {}).get(name) for section, name in sections}
    return {}

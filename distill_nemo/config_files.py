"""Configs as nested plain values, and as YAML files. No torch: the launcher imports this file."""

import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig
from distill_nemo.fields import checked, is_union, require, required_fields, sections_of, suggest
from distill_nemo.runtime.files import why_unreadable, write_atomically

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance


def sections(config: type = RunConfig) -> dict[str, type]:
    """Return the sections of a config by name."""
    return sections_of(typing.get_type_hints(config))


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """Return nested plain values with every field; the inverse of `from_dict`."""
    return asdict(config)


def from_dict(values: object, cls: type = RunConfig, where: str = "") -> Any:
    """Build a config from nested plain values.

    Raises:
        ValueError: naming a field that is unknown, missing or empty, or whose value has the wrong type or range.
    """
    section = where.rstrip(".") or "config"
    if not isinstance(values, dict):
        raise ValueError(f"{section} must be a mapping of fields, got {type(values).__name__}")
    known = {each.name: each for each in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f'unknown field "{where}{name}".{suggest(str(name), sorted(known))}')
    hints = typing.get_type_hints(cls)
    parts = sections_of(hints)
    built = {}
    for name, value in values.items():
        if name not in parts:
            built[name] = checked(f"{where}{name}", value, hints[name], known[name].metadata)
        elif value is None and is_union(hints[name]):
            built[name] = None
        else:
            built[name] = from_dict(value, parts[name], f"{where}{name}.")
    missing = [name for name in required_fields(cls) if name not in values]
    require(not missing, f"{section} leaves out {', '.join(missing)}, which must be set")
    empty = [name for name in required_fields(cls) if built[name] == ""]
    require(not empty, f"{where}{', '.join(empty)} is empty, and must name a directory or files")
    return cls(**built)


def save_yaml(config: RunConfig, path: Path) -> None:
    """Write the config with every field, whole or not at all."""
    import yaml

    text = "# python -m distill_nemo THIS_FILE runs exactly this, under torchrun or alone.\n"
    write_atomically(path, text + yaml.safe_dump(to_dict(config), sort_keys=False))


def load_yaml(path: Path) -> RunConfig:
    """Read the config that `save_yaml` wrote, with YAML's safe loader: a file cannot execute code.

    Raises:
        ValueError: if the file cannot be read, has a field twice, or for a wrong field.
    """
    import yaml

    class FieldsOnce(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            twice = next((key for key, _ in node.value if names.count(key.value) > 1), None)
            if twice is not None:
                raise yaml.MarkedYAMLError(
                    problem=f'the field "{twice.value}" is there twice', problem_mark=twice.start_mark
                )
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), FieldsOnce)
    except FileNotFoundError:
        raise ValueError(f"no such config file: {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {why_unreadable(error)}") from None
    return from_dict(values)

"""Architectures of directories that hold a config.json alone."""

import json

from distill_nemo.config import StudentConfig


def resolve_json(path, config, **stated):
    """Write a config.json, without values that are "absent". Return the architecture; `stated` are further fields."""
    from distill_nemo.models.resolve import resolve

    (path / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x != "absent"}))
    return resolve(StudentConfig(checkpoint=str(path), **stated))

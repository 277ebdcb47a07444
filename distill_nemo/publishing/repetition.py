"""The part of a model card that says how to repeat the run: its config without paths, and the command."""

import math
from typing import Any

from distill_nemo import __version__
from distill_nemo.config import DataConfig, RunConfig
from distill_nemo.config_files import to_dict
from distill_nemo.data.token_files import parse_blend
from distill_nemo.publishing.facts import name_of
from distill_nemo.publishing.markdown import plain

NOT_THE_RESULT = ("output_dir", "benchmarks", "checkpoint", "logging")  # sections that do not change the student
MAX_VALUE = 2000  # characters of a field


def repetition(config: RunConfig, ranks: int) -> str:
    """Return the section, for a run on a number of ranks."""
    import yaml

    text = yaml.safe_dump(plain(changed_fields(config), MAX_VALUE), sort_keys=False, allow_unicode=True, width=math.inf)
    return (
        "## Reproduction\nNames stand for paths: write yours. All other fields have the defaults of distill-nemo "
        f"{__version__}.\n\n````yaml\n{text}````\n\n````\ntorchrun --rdzv-backend loopback "
        f"--nproc-per-node {ranks} -m distill_nemo config.yaml\n````"
    )


def changed_fields(config: RunConfig) -> dict[str, Any]:
    """Return the fields that are not at their defaults, with names in place of paths, without those of no effect.

    Of a model that comes from a checkpoint, the others follow from it.
    """
    values, data = to_dict(config), config.data
    defaults = to_dict(RunConfig("", type(config.student)()))
    for name in ("train", "valid"):
        paths = {path for path, _ in blend_of(data, name)}
        values["data"][name] = [name_of(each) if each in paths else each for each in vars(data)[name]]
    values["data"] |= {"tokenizer": data.tokenizer and name_of(data.tokenizer), "cache": None}
    for role in ("student", "teacher"):
        if values[role] and (checkpoint := values[role]["checkpoint"]):
            values[role] = {"checkpoint": name_of(checkpoint), "vocab_size": values[role]["vocab_size"]}
    found: dict[str, Any] = {"output_dir": name_of(config.output_dir)}
    for section, fields in values.items():
        if section in NOT_THE_RESULT or fields is None:
            continue
        usual = defaults[section] or {}
        differing = {name: value for name, value in fields.items() if value is not None and usual.get(name) != value}
        found |= {section: differing} if differing else {}
    return found


def blend_of(data: DataConfig, name: str = "train") -> list[tuple[str, float | None]]:
    """Return the paths of `train` or `valid`, each with its weight, if that is stated."""
    if not vars(data)[name]:
        return []
    paths, weights = parse_blend(f"data.{name}", vars(data)[name])
    return list(zip(paths, weights or [None] * len(paths), strict=True))

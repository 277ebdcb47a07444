"""What the workers get of a recipe: a complete config."""

import fiddle as fdl

from distill_nemo.config import RunConfig, from_dict, to_dict


def run_config_of(recipe: fdl.Buildable) -> RunConfig:
    """What the workers will get, with every type checked.

    Raises:
        ValueError: for a field of the wrong type, or a recipe without a student.
    """
    given = {name: value for name, value in fdl.build(recipe).keywords.items() if value is not None}
    for name in ("output_dir", "student"):
        if name not in given:
            raise ValueError(f"{name} is not set, and a run needs it")
    return from_dict(to_dict(RunConfig(**given)))

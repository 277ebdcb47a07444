"""Leave places on this machine out of an export's JSON files: a push publishes them."""

import json
import re
from pathlib import Path
from typing import Any

from distill_nemo.hub import hub_name, recorded_name
from distill_nemo.runtime.files import read_object

VOCABULARIES = ("tokenizer.json", "tekken.json", "added_tokens.json", "special_tokens_map.json", "vocab*")
OF_PLACES = re.compile(r"(^|_)(name_or_path|path|file|dir|directory|folder)s?$")  # fields whose paths may be relative
OF_TEXTS = re.compile(r"(^|_)(tokens?|template|strings|content)(_|$)")  # fields of tokens, which may begin with "/"
ABSOLUTE = re.compile(r"(/|~[\w.-]*/|file:|[A-Za-z]:[\\/]|\\\\).*")


def without_places(value: Any, field: str = "") -> Any:
    """Return a JSON value with only the last part of each path, as in model cards. Names on the hub stay.

    Args:
        value: a mapping, list, text or number.
        field: name of the field that it is in.
    """
    of_places = OF_PLACES.search(field) is not None
    if OF_TEXTS.search(field) and not of_places:
        return value
    match value:
        case dict():
            return {name: without_places(each, name) for name, each in value.items()}
        case list():
            return [without_places(each, field) for each in value]
        case str() if of_places or ABSOLUTE.fullmatch(value):
            return _named(value)
    return value


def _named(path: str) -> str:
    name = hub_name(recorded_name(path))
    return str(name) if name else re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def published(file: Path) -> Path | str:
    """Return a file to copy into an export, or its text, if it names places.

    Raises:
        ValueError: if it should be a JSON object and is none.
    """
    if file.suffix != ".json" or any(map(file.match, VOCABULARIES)):
        return file
    stated = read_object(file)
    shown = without_places(stated)
    return file if shown == stated else json.dumps(shown, indent=2)

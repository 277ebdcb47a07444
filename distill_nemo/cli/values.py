"""Parse the VALUE of FIELD=VALUE by the type of its field.

NeMo-Run 0.11.1's own parser strips quotes from both ends of every string, also within lists and dictionaries, imports
what a value names, and returns the same list object twice.
"""

import ast
import contextlib
import re
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from distill_nemo.fields import NO_METADATA, checked, is_union, plain_type

BOOLEANS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
_QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1""", re.S)  # one pair of quotes, with no such quote in between


def parse(path: str, text: str, hint: Any, metadata: Mapping[str, Any] = NO_METADATA) -> Any:
    """Return `text` as a `hint` in the range of `metadata`.

    A string is taken as typed, except for one pair of quotes around all of it. Lists and dictionaries are Python's.

    Raises:
        ValueError: from `fields.checked`.
    """
    if type(None) in typing.get_args(hint) and text in ("None", "null"):
        return None
    plain = plain_type(hint)
    if is_dataclass(plain):
        raise ValueError(f'{path} is a section, got "{text}"; set its fields, such as {path}.{fields(plain)[0].name}=')
    value: Any = text  # `checked` refuses the text if it cannot be parsed
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
        value = _parse(text.strip(), plain) if typing.get_origin(plain) in (list, dict) else _scalar(text, plain)
    return checked(path, value, hint, metadata)


def _parse(text: str, hint: Any) -> Any:
    return _element(ast.parse(text, mode="eval").body, text, hint)


def _element(node: ast.expr, text: str, hint: Any) -> Any:
    """Return an element of the list or dictionary whose source is `text`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_union(hint):
        return _element(node, text, plain_type(hint))
    if origin is list and isinstance(node, ast.List):
        return [_element(each, text, args[0]) for each in node.elts]
    if origin is dict and isinstance(node, ast.Dict) and None not in node.keys:
        pairs = zip(node.keys, node.values, strict=True)
        found = {_element(key, text, args[0]): _element(value, text, args[1]) for key, value in pairs if key}
        if len(found) < len(node.keys):
            raise ValueError(f"a key twice: {text}")
        return found
    if hint is Any:
        return ast.literal_eval(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if hint is str else _scalar(node.value, hint)
    if isinstance(ast.literal_eval(node), bool | int | float):  # from the source, so that a string keeps every digit
        return _scalar(ast.get_source_segment(text, node) or "", hint)
    raise ValueError(f"no {hint}: {ast.unparse(node)}")


def _scalar(text: str, hint: Any) -> Any:
    quoted = _QUOTED.fullmatch(text)
    text = quoted[2] if quoted else text
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return text
    if hint is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"no truth value: {text}")
        return BOOLEANS[text.lower()]
    if hint in (int, float):
        return hint(text)
    if hint is Any:
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
        return text
    raise ValueError(f"no {hint}: {text}")

"""Fields of configs, which carry their help and range, and the function that checks a value.

No torch: the launcher imports this file and must start quickly.
"""

import contextlib
import difflib
import functools
import inspect
import math
import operator
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

NO_METADATA: Mapping[str, Any] = types.MappingProxyType({})
_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
_SHOWN = reprlib.Repr(maxstring=100, maxother=100)


def setting[T](
    default: T,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> T:
    """Return a dataclass field with a default, a line for `--help`, and a range."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "limits": {name: limit for name, limit in limits.items() if limit is not None}}
    if isinstance(default, list | dict):
        return typing.cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


def help_of(metadata: Mapping[str, Any]) -> str:
    """Return a field's range and help."""
    return "; ".join(text for text in (_range_of(metadata), metadata.get("help", "")) if text)


def checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any] = NO_METADATA) -> Any:
    """Return `value` if it has the type `hint` and the range in `metadata`. A float may be given as int or text.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """
    if value == "" and type(None) in typing.get_args(hint):
        raise ValueError(f"{name} is empty; give it a value, or None")
    try:
        value = _converted(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(_wrong_type(name, value, hint)) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    limits = metadata.get("limits", {})
    if value is not None and not all(_LIMITS[limit][1](value, limits[limit]) for limit in limits):
        raise ValueError(f"{name} must be {_range_of(metadata)}, got {value}")
    return value


def typed[**P, R](path: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that checks a function's arguments as `checked` does, under the names `path` + theirs."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature, hints = inspect.signature(function), typing.get_type_hints(function)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                given.arguments[name] = checked(f"{path}{name}", value, hints[name])
            return function(*given.args, **given.kwargs)

        return called

    return decorated


def _converted(value: Any, hint: Any) -> Any:
    """Return `value` as type `hint`.

    Raises:
        TypeError, ValueError, OverflowError: if it cannot be converted.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and type(None) in args):
        return value
    if is_union(hint):
        return _converted(value, plain_type(hint))
    if origin is typing.Literal and isinstance(value, str) and value in args:
        return value
    if origin is list and isinstance(value, list):
        return [_converted(each, args[0]) for each in value]
    if origin is dict and isinstance(value, dict):
        return {_converted(key, args[0]): _converted(each, args[1]) for key, each in value.items()}
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4 as text
    if hint in (int, str, bool) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError


def _wrong_type(name: str, value: Any, hint: Any) -> str:
    plain = plain_type(hint)
    if typing.get_origin(plain) is typing.Literal and isinstance(value, str):
        return f'{name} = "{value}" is not known.{suggest(value, typing.get_args(plain))}'
    examples = {list[str]: """, such as '["a", "b"]'""", dict[str, str]: """, such as '{"a": "b"}'"""}
    return f"{name} must be {type_name(hint)}{examples.get(plain, '')}, got {_SHOWN.repr(value)}"


def _range_of(metadata: Mapping[str, Any]) -> str:
    return " and ".join(f"{_LIMITS[name][0]} {limit}" for name, limit in metadata.get("limits", {}).items())


def is_union(hint: Any) -> bool:
    """Return True for `X | Y` and `Union[X, Y]`."""
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def plain_type(hint: Any) -> Any:
    """Return `X` of `X | None`."""
    return next(arg for arg in typing.get_args(hint) if arg is not type(None)) if is_union(hint) else hint


def type_name(hint: Any) -> str:
    """Return a type as a user would write it; a `Literal` as its choices."""
    if is_union(hint):
        return " | ".join(map(type_name, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def sections_of(hints: Mapping[str, Any]) -> dict[str, type]:
    """Return the dataclasses among types by name: the sections of a config."""
    plain = {name: plain_type(hint) for name, hint in hints.items()}
    return {name: hint for name, hint in plain.items() if isinstance(hint, type) and is_dataclass(hint)}


def required_fields(config: type) -> list[str]:
    """Return the fields of a config that have no default."""
    return [each.name for each in fields(config) if each.default is MISSING and each.default_factory is MISSING]


def takes_fields_of[F: Callable[..., Any]](config: type) -> Callable[[F], F]:
    """Return a decorator that gives a function the signature of a config, for Fiddle and the command line.

    Fields with a default have None in its place.
    """
    hints, required = typing.get_type_hints(config), required_fields(config)
    kind, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(name, kind, default=empty if name in required else None, annotation=hint)
        for name, hint in hints.items()
    ]

    def decorate(function: F) -> F:
        function.__signature__ = inspect.Signature(parameters, return_annotation=None)  # pyright: ignore
        function.__annotations__ = {**hints, "return": None}
        return function

    return decorate


def require(ok: bool, message: str) -> None:
    """Raise `ValueError(message)` unless ok."""
    if not ok:
        raise ValueError(message)


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean ...?' with close matches among the allowed words, or without any the list of all."""
    allowed = list(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(allowed)}."


def first_few(items: list[str], most: int = 5) -> list[str]:
    """Return the first `most` items and, where there are more, how many."""
    return items[:most] + ([f"and {len(items) - most} more"] if len(items) > most else [])


@contextlib.contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Give fields in the text of a `ValueError` the names that they have in the command that was typed.

    Args:
        names: by the names in another command, whose code the block shares.
    """
    try:
        yield
    except ValueError as error:
        known = "|".join(map(re.escape, names))
        error.args = (re.sub(rf"(?<![\w./-])({known})(?![\w/])", lambda found: names[found[0]], str(error)),)
        raise

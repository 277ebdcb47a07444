"""FIELD=VALUE on the command line, checked before NeMo-Run parses it: its own messages print whole configs."""

import ast
import contextlib
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import nemo_run as run
from nemo_run.cli.cli_parser import parse_value

from distill_nemo.cli_help import plain_type, sections, type_name
from distill_nemo.config import near

OVERRIDE = re.compile(r"([\w.]+)=(.*)", re.S)


def parse_arguments(function: Callable[..., Any], arguments: Iterable[str], command: str) -> dict[str, Any]:
    """Values by dotted field.

    Raises:
        ValueError: for what is no override, an unknown field (with near names), a value of the wrong type.
    """
    known = dict(_paths(function))
    parsed = {}
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            raise ValueError(f'"{argument}" is not FIELD=VALUE; see `nemo distill {command} --help`')
        path, value = match.groups()
        if path not in known:
            names = _near(path, known) if known else " There are none."
            raise ValueError(f'unknown field "{path}".{names} See `nemo distill {command} --help`')
        parsed[path] = parse(path, value, known[path])
    return parsed


def override(recipe: Any, values: dict[str, Any]) -> None:
    """Set the fields of a recipe; a section that the recipe leaves out begins at its defaults.

    Not by NeMo-Run, whose parser knows no `str | None`.
    """
    parts = sections(recipe.__fn_or_cls__)
    for path, value in values.items():
        section, _, field = path.rpartition(".")
        if section and getattr(recipe, section) is None:
            setattr(recipe, section, run.Config(parts[section]))
        setattr(getattr(recipe, section) if section else recipe, field, value)


def check_complete(function: Callable[..., Any], given: Container[str], command: str) -> None:
    """Refuse a command whose required fields are not all given.

    Raises:
        ValueError: naming the missing ones.
    """
    parameters = inspect.signature(function).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"missing: {', '.join(f'{name}=' for name in missing)}; see `nemo distill {command} --help`")


def check_factory(factory: Any, recipes: Iterable[Callable[..., Any]]) -> None:
    """Refuse a recipe that is not named or not known (a dotted path may lead elsewhere), or has no such argument.

    Raises:
        ValueError: listing the near names.
    """
    known = {recipe.__name__: recipe for recipe in recipes}
    if factory is None:
        raise ValueError(f"name a recipe, as the first word or by --factory. Known: {', '.join(known)}")
    name = str(factory).partition("(")[0]
    if name not in known and "." not in name:
        raise ValueError(f'unknown recipe "{name}".{near(name, known)}')
    with contextlib.suppress(SyntaxError):  # NeMo-Run's grammar is wider than Python's
        call = ast.parse(str(factory), mode="eval").body
        own = typing.get_type_hints(known[name]) if name in known else {}
        own.pop("return", None)
        for keyword in call.keywords if isinstance(call, ast.Call) and own else []:
            if keyword.arg not in own:
                raise ValueError(f'recipe {name} has no argument "{keyword.arg}".{near(str(keyword.arg), own)}')
            value = ast.get_source_segment(str(factory), keyword.value) or ""
            parse(f"recipe {name}: {keyword.arg}", value, own[keyword.arg])


def check_run_arguments(arguments: Iterable[str]) -> None:
    """Refuse `run.X=VALUE` that means nothing here.

    Raises:
        ValueError: saying what there is.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.startswith("run.") and not value:
            raise ValueError(f"{name} has no value")
        if name.startswith("run") and not re.fullmatch(r"run\.(executor|plugins)(\..+)?", name):
            raise ValueError(f'unknown field "{name}". Known: run.executor, run.executor.FIELD, run.plugins.')


def parse(path: str, value: str, hint: Any) -> Any:
    """`value` as a `hint`.

    Raises:
        ValueError: naming the field `path`, when it is none.
    """
    plain, optional = plain_type(hint), type(None) in typing.get_args(hint)
    if optional and value in ("None", "null"):
        return None
    if is_dataclass(plain):
        raise ValueError(f'{path} is a section, got "{value}"; set its fields, such as {path}.{fields(plain)[0].name}=')
    try:
        return parse_value(value, plain)
    except Exception:  # NeMo-Run raises many kinds, and all say that the value does not fit
        example = """, such as '["a", "b"]'""" if "list[str]" in str(hint) else ""
        raise ValueError(f'{path} must be {type_name(hint)}{example}, got "{value}"') from None


def _paths(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Every dotted field that may be set, with its type."""
    parts = sections(function)
    for name, hint in typing.get_type_hints(function).items():
        if name in ("return", "ctx"):
            continue
        yield name, hint
        if name in parts:
            hints = typing.get_type_hints(parts[name])
            yield from ((f"{name}.{field.name}", hints[field.name]) for field in fields(parts[name]))


def _near(path: str, known: Iterable[str]) -> str:
    """Near names among all of them; if none is, those of the section that was named, or the sections."""
    known = list(known)
    if difflib.get_close_matches(path, known, n=1, cutoff=0.5):
        return near(path, known)
    section = path.partition(".")[0] + "."
    return near(
        path, [name for name in known if name.startswith(section)] or [name for name in known if "." not in name]
    )

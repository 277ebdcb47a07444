"""Parse FIELD=VALUE on the command line, in place of NeMo-Run, whose messages print whole configs."""

import ast
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import nemo_run as run

from distill_nemo.cli.values import parse
from distill_nemo.fields import NO_METADATA, sections_of, suggest

RECIPE = re.compile(r"([A-Za-z_][\w.]*)(?:\((.*)\))?", re.S)  # a name, perhaps with arguments
OVERRIDE = re.compile(r"([\w.]+)=(.*)", re.S)


def parse_arguments(
    function: Callable[..., Any], arguments: Iterable[str], command: str, words: str | None = None
) -> dict[str, Any]:
    """Return the values by dotted field. Arguments that are not FIELD=VALUE are a list, the field `words`.

    Raises:
        ValueError: for an argument that is not FIELD=VALUE, an unknown field (with close matches), or a wrong value.
    """
    known = dict(_paths(function))
    parsed: dict[str, Any] = {}
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if match is None and words is not None and not argument.startswith("-"):
            parsed.setdefault(words, []).append(argument)
            continue
        if match is None:
            raise ValueError(f'"{argument}" is not FIELD=VALUE; see `nemo distill {command} --help`')
        path, value = match.groups()
        if path not in known:
            names = _close_matches(path, known) if known else " There are none."
            raise ValueError(f'unknown field "{path}".{names} See `nemo distill {command} --help`')
        parsed[path] = parse(path, value, *known[path])
    return parsed


def override(recipe: Any, values: dict[str, Any]) -> None:
    """Set fields of a recipe. A section that the recipe leaves out starts from its defaults.

    NeMo-Run's own parser does not know `str | None`.
    """
    parts = sections_of(typing.get_type_hints(recipe.__fn_or_cls__))
    for path, value in values.items():
        section, _, field = path.rpartition(".")
        if section and getattr(recipe, section) is None:
            setattr(recipe, section, run.Config(parts[section]))
        setattr(getattr(recipe, section) if section else recipe, field, value)


def check_complete(function: Callable[..., Any], given: Mapping[str, Any], command: str) -> None:
    """Refuse a command whose required fields are missing or empty.

    Raises:
        ValueError: naming the missing ones.
    """
    parameters = inspect.signature(function).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and given.get(p.name) in (None, "")]
    if missing:
        raise ValueError(f"missing: {', '.join(f'{name}=' for name in missing)}; see `nemo distill {command} --help`")


def find_recipe(name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the recipe of this name.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
    """
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    meant = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ValueError(f'unknown recipe "{name}". {meant}`nemo distill recipes` lists them all')


def called_recipe(call: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the recipe that `NAME`, `NAME(argument=value, ...)` or a dotted path to such a function makes.

    NeMo-Run's own parser splits the arguments at every comma.

    Raises:
        ValueError: for an unknown recipe or argument, with close matches.
    """
    match = RECIPE.fullmatch(call)
    if match is None:
        raise ValueError(f'a recipe is NAME or "NAME(argument=value, ...)", got "{call}"')
    name, arguments = match.groups()
    function = _imported(name) if "." in name else find_recipe(name, known)
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    values = {}
    for argument, value in _arguments(call, arguments or ""):
        if argument not in hints:
            raise ValueError(f'recipe {name} has no argument "{argument}".{suggest(argument, hints)}')
        values[argument] = parse(f"recipe {name}: {argument}", value, hints[argument])
    check_complete(function, values, "train")
    try:
        return function(**values)
    except Exception as error:  # the user's code, which may raise anything
        raise ValueError(f"recipe {call}: {type(error).__name__}: {error}") from None


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        return vars(importlib.import_module(module))[name]
    except Exception as error:  # the user's code fails, or lacks the name
        raise ValueError(f"recipe {path}: {type(error).__name__}: {error}") from None


def _arguments(call: str, arguments: str) -> Iterator[tuple[str, str]]:
    """Yield names and values as typed. A value need not be Python: `teacher=/models/a`."""
    try:
        node = ast.parse(f"f({arguments})", mode="eval").body
    except SyntaxError:
        pairs = [each.partition("=") for each in re.split(r",\s*(?=\w+\s*=)", arguments)]
        yield from ((name.strip(), value.strip()) for name, _, value in pairs)
        return
    assert isinstance(node, ast.Call)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f'the arguments must be NAME=VALUE, got "{call}"')
    for keyword in node.keywords:
        yield str(keyword.arg), ast.get_source_segment(f"f({arguments})", keyword.value) or ""


@dataclass
class RunArguments:
    """The `run.FIELD=VALUE` arguments of a command line."""

    executor: str | None = None
    of_executor: list[str] = field(default_factory=list)  # FIELD=VALUE
    plugins: str | None = None
    of_plugins: list[str] = field(default_factory=list)


def split_run_arguments(arguments: Iterable[str]) -> tuple[RunArguments, list[str]]:
    """Return the `run.` arguments and the others.

    NeMo-Run's own parser also removes "run." and "executor." from values.

    Raises:
        ValueError: for an unknown `run.` field, with the known ones, or one without a value.
    """
    ours, others = RunArguments(), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not name.startswith("run"):
            others.append(argument)
            continue
        match = re.fullmatch(r"run\.(executor|plugins)(?:\.(.+))?", name)
        if name.startswith("run.") and not value:
            raise ValueError(f"{name} has no value")
        if match is None:
            raise ValueError(f'unknown field "{name}". Known: run.executor, run.executor.FIELD, run.plugins.')
        section, of_section = match.groups()
        if of_section:
            vars(ours)[f"of_{section}"].append(f"{of_section}={value}")
        else:
            setattr(ours, section, value)
    if ours.of_executor and ours.executor is None:
        ours.executor = "local"  # the default
    if ours.of_plugins and ours.plugins is None:
        raise ValueError("run.plugins.FIELD needs run.plugins=NAME")
    return ours, others


def _paths(function: Callable[..., Any]) -> Iterator[tuple[str, tuple[Any, Mapping[str, Any]]]]:
    """Yield every dotted field that can be set, with its type and metadata."""
    hints = typing.get_type_hints(function)
    yield from ((name, (hint, NO_METADATA)) for name, hint in hints.items() if name not in ("return", "ctx"))
    for name, section in sections_of(hints).items():
        types = typing.get_type_hints(section)
        yield from ((f"{name}.{each.name}", (types[each.name], each.metadata)) for each in fields(section))


def _close_matches(path: str, known: Iterable[str]) -> str:
    """Suggest close matches among all fields; without any, the fields of the section, or the sections."""
    known = list(known)
    if difflib.get_close_matches(path, known, n=1, cutoff=0.5):
        return suggest(path, known)
    section = path.partition(".")[0] + "."
    return suggest(
        path, [name for name in known if name.startswith(section)] or [name for name in known if "." not in name]
    )

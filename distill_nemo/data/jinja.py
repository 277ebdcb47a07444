"""Jinja as `apply_chat_template` sets it up. Importing transformers for it would take every worker process a second."""

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

START, STOP = "\ufdd0", "\ufdd1"  # around marked text; Unicode reserves them for a program's own use


class _Generation(Extension):
    """Block `{% generation %}` around what the assistant writes."""

    tags: ClassVar[set[str]] = {"generation"}
    around = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        start, stop = self.around
        return f"{start}{caller()}{stop}"


class _Marked(_Generation):
    around = (START, STOP)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, quicker with `message.content`: it would look for an attribute first, which a dictionary lacks."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)


@functools.cache
def compiled(source: str, marked: bool) -> jinja2.Template:
    """Return a template. If `marked`, the text of each generation block is between `START` and `STOP`."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if marked else _Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # not a ChainMap, whose copy takes half of a short rendering
    return template


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

"""Text of unknown origin in Markdown, so that nothing in it is markup."""

from typing import Any

MAX_SHOWN = 80  # characters of a name


def title(text: str) -> str:
    """Return a heading of plain letters, digits and a few signs."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "./-_ ") else "-" for c in text)[:MAX_SHOWN]


def code(text: object) -> str:
    """Return a span of code."""
    return f"`{plain(text)}`"


def plain(value: Any, most: int = MAX_SHOWN) -> Any:
    """Return text without control characters and backticks, cut after `most`; values that contain text, likewise."""
    if isinstance(value, dict):
        return {plain(name, most): plain(each, most) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each, most) for each in value]
    if isinstance(value, int | float) or value is None:
        return value
    shown = "".join(c if c.isprintable() and c != "`" else "?" for c in str(value))
    return shown[:most].strip() or "?"

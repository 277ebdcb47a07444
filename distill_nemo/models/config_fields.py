"""Type-checked fields of a checkpoint's configuration, whose file may hold anything.

Upper limits, far above any model's sizes, bound the memory that is taken before weights are read.
"""

import reprlib
from dataclasses import dataclass
from typing import Any, TypeGuard

MAX_SIZE = 2**24
MAX_LAYERS = 10_000
MAX_HEADS = 4096
MAX_EXPERTS = 10_000
MAX_EXPERTS_IN_ALL_LAYERS = 200_000
MAX_POSITIONS = 2**31
MAX_NUMBER = 1e30
_SHORT = reprlib.Repr(maxstring=80, maxother=80)


@dataclass(frozen=True)
class Fields:
    """Fields and their location: the file, or a field in it. A null counts as absent.

    For a value of another type every method raises a `ValueError` with file, field, value and what is allowed.
    """

    values: dict[str, Any]
    where: str

    def integer(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Return a positive integer."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a positive integer")
        if value > most:
            raise self.wrong(name, f"at most {most:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive, finite number."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not is_number(value) or not 0 < value <= MAX_NUMBER:
            raise self.wrong(name, "a positive number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return positive, finite numbers, at least one."""
        values = self.values.get(name)
        if not isinstance(values, list) or not values:
            raise self.wrong(name, "a list of positive numbers")
        if not all(is_number(value) and 0 < value <= MAX_NUMBER for value in values):
            raise self.wrong(name, "a list of positive numbers")
        return tuple(map(float, values))

    def flag(self, name: str) -> bool:
        """Return true or false; false if absent."""
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true, false or null")
        return bool(value)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string. An explicit null is refused."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def mapping(self, name: str) -> "Fields":
        """Return a JSON object; empty if absent."""
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self.wrong(name, "an object or null")
        return Fields(value or {}, f"{self.where}: {name}")

    def wrong(self, name: str, wanted: str) -> ValueError:
        """Return the error for a field that is not as wanted."""
        return ValueError(
            f"{self.where}: {name} must be {wanted}, got {shown(self.values.get(name))}; correct the file"
        )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return True for a number that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return a short `repr` of any value."""
    return _SHORT.repr(value)

"""Schedules: loss weights and a temperature that change from step to step.

`"cosine 0:4 2000:1"` is a shape and its points, `step:value`. A value follows from the number of its step alone, so a
resumed run goes on with the same values. No torch: the launcher imports this file.
"""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from distill_nemo.fields import require, suggest

SHAPES = ("linear", "cosine", "constant")
EXAMPLE = 'write a shape and points, such as "linear 0:4 2000:1"'
_POINT = re.compile(r"(\d{1,15}):([-+.\deE]+)")


@dataclass(frozen=True)
class Schedule:
    """A value for every step. Before the first point and after the last, theirs holds.

    Args:
        shape: how the value goes from one point to the next: `linear`, in half a period of a `cosine`, or `constant`
            until the next point.
        points: (step, value), in the order of the steps. Steps count from 1, as in the metrics.
    """

    shape: str
    points: tuple[tuple[int, float], ...]

    def at(self, step: int) -> float:
        """Return the value at a step."""
        after = bisect_right(self.points, step, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        (start, value) = self.points[after - 1]
        if after == len(self.points) or self.shape == "constant":
            return value
        end, target = self.points[after]
        done = (step - start) / (end - start)
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return value + (target - value) * share

    def __str__(self) -> str:
        """Return the points in words."""
        return f"{self.shape}, " + ", ".join(f"{value:g} at step {step:,}" for step, value in self.points)


def parse_schedule(name: str, text: str) -> Schedule:
    """Return the schedule that a text such as `"cosine 0:4 2000:1"` describes.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """
    shape, *points = text.split() or [""]
    require(shape in SHAPES, f'{name} = "{text}": {shape or "an empty text"} is no shape.{suggest(shape, SHAPES)}')
    require(bool(points), f'{name} = "{text}" has no points; {EXAMPLE}')
    found = tuple(_point(name, point) for point in points)
    for (step, _), (following, _) in pairwise(found):
        require(step < following, f'{name} = "{text}": step {following} comes after step {step}; order the points')
    return Schedule(shape, found)


def _point(name: str, text: str) -> tuple[int, float]:
    match = _POINT.fullmatch(text)
    try:
        value = float(match[2]) if match else math.nan
    except ValueError:
        value = math.nan
    require(math.isfinite(value), f'{name}: "{text}" is not a point step:value; {EXAMPLE}')
    assert match is not None, "or the value would be NaN"
    return int(match[1]), value

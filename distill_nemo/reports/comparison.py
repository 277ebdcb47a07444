"""Comparison of models: format of its numbers, the best model of each column, and the finding in a sentence. No torch.

A row is `{"model": name, "parameters": n, "lm_loss": nats, "perplexity": x, "forward_kl": nats,
"top1_agreement": 0 to 1}`. A missing, null or NaN entry is printed as a dash. A model's role follows from its name, see
`role`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from distill_nemo.runtime.metrics_file import finite

Row = dict[str, Any]
ROLES = ("distilled", "alone", "initial", "teacher")
MISSING = "–"
SCIENTIFIC = 1e6  # from here on a number is printed as a power of ten
ZERO = 1e-5  # nats; smaller values are rounding errors of a model compared with itself


def role(name: str) -> str:
    """Return the first of `ROLES` that occurs in `name`, or "": "distilled student" is distilled."""
    return next((r for r in ROLES if r in name.lower()), "")


def perplexity(lm_loss: float) -> float:
    """Return exp(`lm_loss`), of a loss of at most 700 nats: beyond, a float overflows. NaN stays NaN."""
    return math.exp(min(lm_loss, 700.0))


def four_digits(value: Any) -> str:
    """Format a number with four significant digits: 0.1502, 43.60, 1,234, 1e30, inf."""
    if not isinstance(value, int | float) or (math.isnan(finite(value)) and value not in (math.inf, -math.inf)):
        return MISSING
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if abs(value) < ZERO:
        return "0"
    if abs(value) >= SCIENTIFIC:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")


def count(value: Any) -> str:
    """Format a number of parameters or tokens: 950, 1.2 M, 134 M, 8.0 B."""
    number = finite(value)
    if math.isnan(number):
        return MISSING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:  # smaller numbers round to less than 1000 of the next unit
            scaled = number / size
            return f"{scaled:.1f} {unit}" if scaled < 99.95 else f"{scaled:.0f} {unit}"
    return f"{number:.0f}"


def percent(value: Any) -> str:
    """Format a share as a percentage: 70.1 %."""
    number = finite(value)
    return MISSING if math.isnan(number) else f"{100 * number:.1f} %"


@dataclass(frozen=True)
class Column:
    """A column of the comparison. `better` picks the best of two values; None if neither is better."""

    key: str
    title: str
    unit: str
    form: Callable[[Any], str]
    better: Callable[[list[float]], float] | None


COLUMNS = (
    Column("parameters", "params", "", count, None),
    Column("lm_loss", "LM loss", "nats per token", four_digits, min),
    Column("perplexity", "perplexity", "", four_digits, min),
    Column("forward_kl", "forward KL", "nats per token", four_digits, min),
    Column("top1_agreement", "top-1 agreement", "of tokens", percent, max),
)


def best(table: list[Row], column: Column) -> set[str]:
    """Return the names of the best students; empty if there are fewer than two to compare."""
    values = {row["model"]: finite(row.get(column.key)) for row in table if role(row["model"]) != "teacher"}
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    if column.better is None or len(values) < 2:
        return set()
    top = column.better(list(values.values()))
    return {name for name, value in values.items() if value == top}


def render_table(table: list[Row]) -> Table:
    """Return the comparison for a terminal of 80 columns; a star marks the best student."""
    out = Table(box=box.SIMPLE_HEAD, caption="held out; losses in nats per token; * best student")
    out.add_column("model", overflow="fold")
    for column in COLUMNS:
        out.add_column(column.title.replace(" ", "\n"), justify="right")
    winners = {column.key: best(table, column) for column in COLUMNS}
    for row in table:
        cells = [Text(row["model"])]
        for column in COLUMNS:
            wins = row["model"] in winners[column.key]
            mark = " *" if wins else "  " if winners[column.key] else ""  # the digits stay aligned
            cells.append(Text(column.form(row.get(column.key)) + mark, "bold" if wins else ""))
        out.add_row(*cells)
    return out


def finding(table: list[Row]) -> str:
    """Return a sentence: how much of the LM-loss gap between teacher and student alone the distilled student closes."""
    rows = {name: _lowest([row for row in table if role(row["model"]) == name]) for name in ROLES}
    teacher, alone, distilled = rows["teacher"], rows["alone"], rows["distilled"]
    if not (teacher and alone and distilled):
        return _lowest_of_all(table)
    gap, gain = alone["lm_loss"] - teacher["lm_loss"], alone["lm_loss"] - distilled["lm_loss"]
    us, them = _named(distilled), _named(alone)
    if abs(gain) < 5e-4:
        return f"Distillation makes no difference in held-out LM loss: {us}, {them}."
    if gain < 0:
        return (
            f"Distillation loses: in held-out LM loss {us} is worse than {them} by {four_digits(-gain)} nats per token."
        )
    if gap <= 0:
        return f"Distillation wins, with no gap to close: {us}, {them}, {_named(teacher)}, in nats per token."
    if gain >= gap:
        return f"Distillation closes the whole gap in held-out LM loss: {us}, {_named(teacher)}, {them}."
    share = "less than 1 %" if gain / gap < 0.01 else f"{min(round(100 * gain / gap), 99)} %"
    return (
        f"Distillation closes {share} of the gap in held-out LM loss between {them} and {_named(teacher)}: "
        f"{distilled['model']} reaches {four_digits(distilled['lm_loss'])} nats per token."
    )


def _lowest(rows: list[Row]) -> Row | None:
    known = [row for row in rows if not math.isnan(finite(row.get("lm_loss")))]
    return min(known, key=lambda row: row["lm_loss"], default=None)


def _lowest_of_all(table: list[Row]) -> str:
    lowest = _lowest([row for row in table if role(row["model"]) != "teacher"])
    if lowest is None:
        return "No student has a finite held-out LM loss."
    lost = [row["model"] for row in table if math.isnan(finite(row.get("lm_loss")))]
    if lost:
        return f"No finite held-out LM loss: {', '.join(lost)}. Lowest of the students: {_named(lowest)}."
    return f"The lowest held-out LM loss of a student: {_named(lowest)}, in nats per token."


def _named(row: Row) -> str:
    return f"{row['model']} ({four_digits(row['lm_loss'])})"

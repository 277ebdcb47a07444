"""Documents of the runs' training data, as a report shows them. No torch."""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from distill_nemo.config import DataConfig
from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.inspect import ShownDocument, shown_documents
from distill_nemo.data.token_files import parse_blend
from distill_nemo.reports.runs import RecordedRun

MAX_PARTS, MAX_DOCUMENTS, MAX_TOKENS = 4, 4, 200  # shown, of each part, of each document


class ShownPart(NamedTuple):
    """Documents of token files that runs were trained on, or why they cannot be shown."""

    name: str
    documents: list[ShownDocument]
    problem: str = ""


def data_of(runs: list[RecordedRun]) -> list[ShownPart]:
    """Return some documents of each part of the runs' training data that is at hand. Stores are not shown."""
    parts = itertools.chain.from_iterable(_parts(run.config.data) for run in runs if run.config is not None)
    there = (part for part in dict.fromkeys(parts) if Path(f"{part[0]}.idx").is_file())
    return [shown(*part) for part in itertools.islice(there, MAX_PARTS)]


def _parts(data: DataConfig) -> list[tuple[str, LossOn | None]]:
    try:
        return [(prefix, data.loss_on) for prefix in parse_blend("data.train", data.train)[0]]
    except ValueError:
        return []  # the config of another run, which may be damaged


@functools.cache  # a report that follows a run writes its page again and again
def shown(prefix: str, loss_on: LossOn | None) -> ShownPart:
    """Return some documents of token files, spread over them."""
    name = prefix if loss_on is None else f"{prefix}, loss_on={loss_on}"
    try:
        documents = shown_documents(prefix, MAX_DOCUMENTS, max_tokens=MAX_TOKENS, loss_on=loss_on)
        return ShownPart(name, list(itertools.islice(documents, MAX_DOCUMENTS)))
    except (ValueError, OSError) as error:
        return ShownPart(name, [], str(error))

"""Facts about a model for a model card: name, licence, what it was cut from. Nothing in its directory is trusted."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distill_nemo.hub import COMMIT, HubName, cached, hub_name, recorded_name
from distill_nemo.models.sources import STEP
from distill_nemo.runtime.checksums import identity_of
from distill_nemo.runtime.files import read_object, read_object_if_any
from distill_nemo.runtime.metrics_file import finite

MAX_FRONT_MATTER, MAX_LICENCE = 2**16, 2**12  # bytes that are read
MAX_CHAIN = 8  # models that one was made from, each from the next
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\r?\n)---\r?\n", re.S)
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")
_TEXTS = {"apache-2.0": ("apache license", "version 2.0"), "mit": ("mit license", "permission is hereby granted")}


@dataclass(frozen=True)
class Cut:
    """A cut by `nemo distill prune`.

    Args:
        model: what was cut.
        parameters: numbers of them before and after.
        sizes: those that changed, before and after.
        lm_loss: held out, before and after.
    """

    model: "ModelFacts"
    parameters: tuple[int, int]
    sizes: dict[str, tuple[int, int]]
    lm_loss: tuple[float, float]


@dataclass(frozen=True)
class ModelFacts:
    """A model, as far as its directory tells.

    Args:
        name: by `name_of`.
        repository: ORG/NAME of a model of the hub; "" for others.
        licence: as the hub names it, "other", or "" if nothing says.
        licence_name: of another one.
        cut: if it was cut from a larger model.
    """

    name: str
    repository: str = ""
    licence: str = ""
    licence_name: str = ""
    cut: Cut | None = None


def model_facts(checkpoint: str, chain: int = 0) -> ModelFacts:
    """Return the facts about a checkpoint of any kind. A licence may come from the model that it was made from."""
    path, on_hub = Path(cached(checkpoint)), _hub_name(checkpoint)
    cut = _cut(path, chain) if chain < MAX_CHAIN else None
    licence, licence_name = _licence(path)
    if not licence and chain < MAX_CHAIN:
        before = cut.model if cut else _before(path, chain)
        licence, licence_name = (before.licence, before.licence_name) if before else ("", "")
    repository = on_hub.repository if on_hub else ""
    return ModelFacts(name_of(checkpoint), repository, licence, licence_name, cut)


class Benchmark(NamedTuple):
    """A metric of a task, with its standard error; NaN if that is not known."""

    task: str
    metric: str
    value: float
    error: float


def benchmarks_of_step(run: Path, step: int) -> list[Benchmark]:
    """Return the benchmarks that `nemo distill evaluate steps_of=RUN` has measured of a step; none if it has not.

    Scores of a checkpoint that the run has replaced are none.
    """
    found = []
    try:
        stated = read_object_if_any(run / "benchmarks" / f"step_{step:08d}.json")
        saved = run / "checkpoints" / f"step_{step:08d}"
        if saved.is_dir() and stated.get("identities", {}).get(f"step {step}") != identity_of(saved):
            return []
        for each in stated.get("scores", []):
            (model, value), *others = each["values"].items()
            if not others:
                error = finite(each["errors"].get(model))
                found.append(Benchmark(str(each["task"]), str(each["metric"]), _finite(value), error))
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    return found


def name_of(path: str) -> str:
    """Return a name without the place: ORG/NAME@COMMIT of the hub, of parts of a run the run's, else the last part."""
    if name := _hub_name(path):
        return str(name)
    here = Path(path)
    if STEP.fullmatch(here.name):
        here = here.parent
    if here.name in ("student", "pruned", "checkpoints") and (here.parent / "config.yaml").is_file():
        here = here.parent
    return here.name or "model"


def _hub_name(path: str) -> HubName | None:
    """Return the name on the hub, if `path` is one with a commit, as runs record it, or a directory in the cache."""
    name = hub_name(recorded_name(path))
    return name if name is not None and COMMIT.fullmatch(name.revision or "") else None


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the metadata of a model card; empty without any."""
    import yaml

    match = _FRONT_MATTER.match(_beginning(readme, MAX_FRONT_MATTER))
    try:
        content = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _licence(directory: Path) -> tuple[str, str]:
    """Return the licence that a directory states, by its card or else by its first licence file; and its name."""
    stated = front_matter(directory / "README.md")
    licence = stated.get("license")
    if isinstance(licence, str) and _ID.fullmatch(licence):
        return licence, _slug(stated.get("license_name")) if licence == "other" else ""
    files = sorted(file for pattern in ("LICENSE*", "LICENCE*") for file in directory.glob(pattern))
    text = _beginning(files[0], MAX_LICENCE) if files else ""
    if not text.strip():
        return "", ""
    for known, phrases in _TEXTS.items():
        if all(phrase in text.lower() for phrase in phrases):
            return known, ""
    return "other", _slug(text.strip().splitlines()[0])


def _slug(text: Any) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] if isinstance(text, str) else ""


def _beginning(path: Path, size: int) -> str:
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return ""
        with path.open("rb") as file:
            return file.read(size).decode(errors="replace")
    except OSError:
        return ""


def _before(path: Path, chain: int) -> ModelFacts | None:
    """Return the student that a run of ours began with, if `path` is such a run or a checkpoint of it."""
    steps = sorted((path / "checkpoints").glob("step_*/run.json")) or sorted(path.glob("step_*/run.json"))
    try:
        record = read_object(steps[-1]) if steps else read_object_if_any(path / "run.json")
    except ValueError:
        return None
    student = record.get("student")
    checkpoint = student.get("checkpoint") if isinstance(student, dict) else None
    return model_facts(checkpoint, chain + 1) if isinstance(checkpoint, str) else None


def _cut(path: Path, chain: int) -> Cut | None:
    try:
        record = read_object_if_any(path / "pruning.json")
        before, after, loss = record["model"], record["result"], record["held_out_lm_loss"]
        sizes = {
            str(name): (_count(before["sizes"][name]), _count(size))
            for name, size in after["sizes"].items()
            if before["sizes"][name] != size
        }
        parameters = _count(before["num_parameters"]), _count(after["num_parameters"])
        losses = _finite(loss["model"]), _finite(loss["result"])
        return Cut(model_facts(str(before["path"]), chain + 1), parameters, sizes, losses)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)

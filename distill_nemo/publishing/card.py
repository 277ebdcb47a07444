"""The model card of a distilled student, written from its run: README.md, with metadata that the hub reads.

The same run always has the same card. It names no place: of a path only the last part is told. Text that comes from a
checkpoint or a path is shown as code, in which nothing is markup.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill_nemo import __version__
from distill_nemo.config import DataConfig, DistillationConfig, RunConfig
from distill_nemo.data.corpora import corpus_at
from distill_nemo.data.manifest import pack_length
from distill_nemo.publishing.facts import Benchmark, ModelFacts, benchmarks_of_step, model_facts, name_of
from distill_nemo.publishing.markdown import code, plain, title
from distill_nemo.publishing.repetition import blend_of, repetition
from distill_nemo.quantization import ExportFormatName
from distill_nemo.runtime import metrics_file
from distill_nemo.runtime.metrics_file import finite
from distill_nemo.teacher_store.manifest import is_store
from distill_nemo.teacher_store.reader import TeacherStore

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformers")
METRICS = {
    "lm_loss": "LM loss (nats per token)",
    "perplexity": "perplexity",
    "forward_kl": "forward KL to the teacher (nats per token)",
    "top1_agreement": "top-1 agreement with the teacher",
    "teacher_lm_loss": "teacher's LM loss (nats per token)",
}


@dataclass(frozen=True)
class Distilled:
    """An exported student and its run.

    Args:
        config: of the run.
        directory: of the run, with its metrics.
        step: that is exported; None if that is not known.
        num_parameters: of the student.
        title: ORG/NAME that it is pushed to, or else the run's name.
        quantized: format of a quantised student's export; none: its rounded weights, as plain ones.
    """

    config: RunConfig
    directory: Path
    step: int | None
    num_parameters: int
    title: str
    quantized: ExportFormatName = "modelopt"

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of the run's metrics, up to the step."""
        lines = metrics_file.read(self.directory / "metrics.jsonl")
        return [] if self.step is None else [line for line in lines if line["step"] <= self.step]

    @cached_property
    def student(self) -> ModelFacts | None:
        """The model that the student began as; None for random weights."""
        checkpoint = self.config.student.checkpoint
        return model_facts(checkpoint) if checkpoint else None

    @cached_property
    def teachers(self) -> list[ModelFacts]:
        """The teacher, or those of the stores that the run was trained from, as far as these are still there."""
        if self.config.teacher is not None and self.config.teacher.checkpoint is not None:
            return [model_facts(self.config.teacher.checkpoint)]
        stores = [path for path, _ in blend_of(self.config.data) if is_store(path)]
        return [model_facts(each) for each in dict.fromkeys(filter(None, map(_teacher_of, stores)))]

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """Benchmarks of the step, if they were measured."""
        return [] if self.step is None else benchmarks_of_step(self.directory, self.step)

    @cached_property
    def distilled(self) -> bool:
        """True if the student had a teacher."""
        return bool(self.teachers) or any("kd_loss" in line for line in self.lines)


def _teacher_of(store: str) -> str | None:
    try:
        return TeacherStore(store).manifest.checkpoint
    except ValueError:
        return None


def model_card(of: Distilled) -> str:
    """Return the card."""
    import yaml

    evaluation = _evaluation(of.lines)
    metadata = yaml.safe_dump(_metadata(of, evaluation), sort_keys=False, allow_unicode=True, width=math.inf)
    parts = [
        f"---\n{metadata}---\n\n# {title(of.title)}",
        _summary(of),
        "## Models\n" + _bullets(_models(of)),
        "## Data\n" + _bullets(_data(of.config.data)),
        "## Training\n" + _bullets(_training(of)),
        _metrics(evaluation),
        _benchmarks(of.benchmarks),
        repetition(of.config, _last_start(of.lines)[0]),
        "## Licences\n" + _bullets(_licences(of)),
        "## Limits\n" + _bullets(_limits(of)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(of: Distilled, evaluation: dict[str, Any]) -> dict[str, Any]:
    student, found = of.student, {}
    if student is not None and student.licence:
        found["license"] = student.licence
        if student.licence == "other":
            found |= {"license_name": student.licence_name or "other", "license_link": "LICENSE"}
    quantised = of.quantized != "none" and of.config.quantization.format != "none"
    origin = student.cut.model if student and student.cut else student
    if origin is not None and origin.repository:
        found |= {"base_model": origin.repository, "base_model_relation": "quantized" if quantised else "finetune"}
    traits = {"distill-nemo": True, "distillation": of.distilled, "pruned": student is not None and student.cut}
    traits["quantized"] = quantised
    tags = [name for name, holds in traits.items() if holds]
    by_modelopt = quantised and of.quantized == "modelopt"  # which transformers cannot open
    library = "Model Optimizer" if by_modelopt else "transformers"
    found |= {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    values = [{"type": name, "name": METRICS[name], "value": value} for name, value in _shown(evaluation).items()]
    results = [_result("held-out", "held-out text of the training data", values)] if values else []
    for each in of.benchmarks:
        value = {"type": plain(each.metric), "name": plain(each.metric), "value": round(each.value, 4)}
        results.append(_result(plain(each.task), plain(each.task), [value]))
    if results:
        found["model-index"] = [{"name": title(of.title).rpartition("/")[2], "results": results}]
    return found


def _result(dataset: str, name: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": {"type": dataset, "name": name}, "metrics": metrics}


def _summary(of: Distilled) -> str:
    teachers = " and ".join(code(each.name) for each in of.teachers)
    how = f"distilled from {teachers or 'a teacher'}" if of.distilled else "trained on text, without a teacher,"
    return f"A language model of {of.num_parameters:,} parameters, {how} with distill-nemo {__version__}."


def _models(of: Distilled) -> list[str]:
    student, config = of.student, of.config
    shape = f"{config.student.num_layers} layers, hidden size {config.student.hidden_size}"
    began = f"initialised from {code(student.name)}" if student else "randomly initialised"
    lines = [f"student: {code(config.student.family)}, {shape}; {began}"]
    if student and student.cut:
        cut = student.cut
        sizes = ", ".join(f"{code(name)} {old:,} to {new:,}" for name, (old, new) in cut.sizes.items())
        losses = "held-out LM loss before the distillation: {:.4f}, of the model that was cut {:.4f}"
        lines.append(
            f"cut from {code(cut.model.name)}, {cut.parameters[0]:,} to {cut.parameters[1]:,} parameters: {sizes}; "
            + losses.format(cut.lm_loss[1], cut.lm_loss[0])
        )
    numbers = config.quantization
    if numbers.format != "none":
        cache = f"; keys and values: {code(numbers.kv_cache)}" if numbers.kv_cache != "none" else ""
        plain_now = "" if of.quantized != "none" else "; here are the rounded weights, and inputs are no longer rounded"
        lines.append(f"trained as {code(numbers.format)} computes{cache}{plain_now}")
    return [*lines, *(f"teacher: {code(each.name)}" for each in of.teachers)]


def _data(data: DataConfig) -> list[str]:
    lines = []
    for path, weight in blend_of(data):
        about = [] if weight is None else [f"weight {weight:g}"]
        try:
            corpus = corpus_at(path)
            about += [f"{corpus.pass_tokens():,} tokens"]
            about += [f"{corpus.valid_share:.0%} of them valid"] if corpus.valid_share is not None else []
            length = None if is_store(path) else pack_length(path)
            about += [f"packs of {length:,}"] if length else []
            about += ["a teacher's stored targets"] if is_store(path) else []
        except (ValueError, OSError):
            about.append("no longer there when this card was written")
        lines.append(f"{code(name_of(path))}: {', '.join(about)}")
    held_out = ", ".join(code(name_of(path)) for path, _ in blend_of(data, "valid"))
    lines.append(f"held out: {held_out or f'documents of the same data, {code(data.split)} (train, valid, test)'}")
    if data.loss_on:
        lines.append(f"tokens of conversations that count: {data.loss_on}")
    return [*lines, f"tokenizer: {code(name_of(data.tokenizer))}"] if data.tokenizer else lines


def _training(of: Distilled) -> list[str]:
    training, optimizer, length = of.config.training, of.config.optimizer, of.config.data.sequence_length
    tokens = next((line.get("tokens") for line in reversed(of.lines) if line.get("kind") == "train"), None)
    taken = "" if of.step is None else f"{of.step:,} "
    valid = "" if math.isnan(finite(tokens)) else f"; {finite(tokens):,.0f} valid tokens"
    lines = [
        f"{taken}steps of {training.global_batch_size:,} sequences of {length:,} tokens{valid}",
        f"loss: {_loss(of.config.distillation) if of.distilled else 'LM loss'}",
        f"learning rate {optimizer.lr:g} to {optimizer.min_lr:g}, {optimizer.decay_style}, "
        f"{optimizer.warmup_steps:,} steps of warm-up; weight decay {optimizer.weight_decay:g}",
    ]
    ranks, device = _last_start(of.lines)
    hours = metrics_file.gpu_hours(of.lines)
    spent = "" if hours is None else f"; {hours:,.2f} device-hours in steps"
    lines += [f"{ranks} ranks on {code(device)}{spent}"] if device else []
    return [*lines, f"exported with {', '.join(_versions())}"]


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a container may have it without metadata
            yield f"{name} {version(name)}"


def _last_start(lines: list[dict[str, Any]]) -> tuple[int, str]:
    """Return the ranks of the last process of the run, 1 if it does not say, and their device."""
    found = next((line for line in reversed(lines) if line.get("kind") == "start"), {})
    ranks = finite(found.get("world_size"))
    return max(int(ranks), 1) if 0 < ranks < 1e9 else 1, str(found.get("device") or "")


def _loss(losses: DistillationConfig) -> str:
    kd = losses.divergence.replace("_", " ") + (f" of the teacher's {losses.top_k} likeliest" if losses.top_k else "")
    named = [f"{kd} at temperature {losses.temperature:g}"] if losses.uses_logits else []
    named += ["LM loss"] if losses.uses_lm_loss else []
    named += [f"{losses.hidden_loss} loss of hidden states"] if losses.hidden_layers else []
    schedules = "; by step: " + ", ".join(losses.schedules) if losses.schedules else ""
    return f"{', '.join(named)} ({losses.balancer} weights){schedules}"


def _evaluation(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found = next((line for line in reversed(lines) if line.get("kind") == "eval"), {})
    loss = finite(found.get("lm_loss"))
    return found if math.isnan(loss) else found | {"perplexity": math.exp(min(loss, 700.0))}


def _shown(evaluation: dict[str, Any]) -> dict[str, float]:
    values = {name: finite(evaluation.get(name)) for name in METRICS}
    return {name: round(value, 4) for name, value in values.items() if not math.isnan(value)}


def _metrics(evaluation: dict[str, Any]) -> str:
    rows = "\n".join(f"| {METRICS[name]} | {value:,.4f} |" for name, value in _shown(evaluation).items())
    head = f"## Held-out metrics\nAfter step {evaluation.get('step', 0):,}.\n\n| metric | value |\n|---|---|\n"
    return head + rows if rows else ""


def _benchmarks(benchmarks: list[Benchmark]) -> str:
    lines = []
    for each in benchmarks:
        error = "" if math.isnan(each.error) else f" ± {each.error:.4f}"
        lines.append(f"{code(each.task)}, {code(each.metric)}: {each.value:.4f}{error}")
    return "## Benchmarks\nBy lm-evaluation-harness; ± standard error.\n\n" + _bullets(lines) if lines else ""


def _licences(of: Distilled) -> list[str]:
    models = {"student": [of.student] if of.student else [], "teacher": of.teachers}
    lines = []
    for role, each in ((role, each) for role, found in models.items() for each in found):
        stated = each.licence_name or each.licence
        lines.append(f"{role}, {code(each.name)}: {code(stated) if stated else 'its directory states none'}")
    if of.distilled:
        lines.append("the teacher's licence may also cover students distilled from it")
    return lines or ["none is stated"]


def _limits(of: Distilled) -> list[str]:
    measured = "" if of.benchmarks else "; no benchmark was run for this card"
    return [
        f"the held-out metrics were measured on text like the training data{measured}",
        f"it was not trained on sequences longer than {of.config.data.sequence_length:,} tokens",
        f"it inherits errors and biases of {'its teacher and ' if of.distilled else ''}its data; none were mitigated",
    ]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)

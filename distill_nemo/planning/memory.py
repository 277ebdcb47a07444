"""Memory of a rank by part, at its peak in a step.

Legend: T tokens of a micro batch on a rank, H width, v this rank's shard of the padded vocabulary.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import numpy as np

from distill_nemo.losses.fused_linear.chunk_size import chunk_size
from distill_nemo.models.architecture import padded_vocab_size
from distill_nemo.planning import activations
from distill_nemo.planning.parameters import rank_layers, stages_of
from distill_nemo.planning.planned import PlannedRun


@dataclass
class Memory:
    """Bytes of one pipeline rank: permanent parts, plus activations and workspace at the moment that needs most."""

    rank: int
    stays: dict[str, float]  # by part, for the whole run
    activations: dict[str, float] = field(default_factory=dict)  # by moment: saved by micro batches so far
    workspace: dict[str, float] = field(default_factory=dict)  # by moment: needed besides
    before: dict[str, str] = field(default_factory=dict)  # by moment: the micro batches counted, "others" or "all"

    @property
    def moment(self) -> str:
        """Moment at which the rank needs most."""
        return max(self.workspace, key=lambda name: self.activations[name] + self.workspace[name])

    @property
    def total(self) -> float:
        """Bytes at that moment."""
        return sum(self.stays.values()) + self.activations[self.moment] + self.workspace[self.moment]


def fullest(planned: PlannedRun) -> Memory:
    """Return the memory of the pipeline rank that needs most."""
    ranks = range(planned.config.parallelism.pipeline_model_parallel_size)
    return max((memory_of(planned, rank) for rank in ranks), key=lambda memory: memory.total)


def memory_of(planned: PlannedRun, rank: int) -> Memory:
    """Return the memory of one pipeline rank."""
    memory = Memory(rank, permanent(planned, rank))
    one, all_ = _saved(planned, rank)
    for moment, (before, workspace) in _moments(planned, rank).items():
        memory.activations[moment] = {"others": all_ - one, "all": all_}[before]
        memory.workspace[moment] = workspace
        memory.before[moment] = before
    return memory


def permanent(planned: PlannedRun, rank: int) -> dict[str, float]:
    """Return the bytes of a pipeline rank for the whole run, by part."""
    student, teacher, shards = planned.student(rank), planned.teacher(rank), planned.shards(planned.student(rank))
    masters = 4 if planned.item == 2 else 0
    waiting = len(stages_of(planned.config.parallelism, rank)) * planned.staged_layer(rank)
    elsewhere = planned.in_host_memory(rank) if planned.on_gpu else 0  # a CPU's memory is the host's
    return {
        "weights": planned.item * student.total,
        "gradients": 4 * student.total,
        "optimizer": (masters + 8) * shards,
        "teacher's weights": planned.item * (teacher.total - elsewhere + waiting),
        "teacher's output layer": stored_output_layer(planned) if planned.is_last(rank) else 0,
    }


def stored_output_layer(planned: PlannedRun) -> float:
    """Return the bytes of this rank's rows of the output layer in a store of hidden states."""
    if planned.stored is None or planned.stored.codec != "hidden":
        return 0
    return planned.stored.coding.usual_bytes * columns(planned)


def _moments(planned: PlannedRun, rank: int) -> dict[str, tuple[str, float]]:
    """Return by moment the micro batches whose activations are held, "others" or "all", and the workspace."""
    student, teacher = planned.models
    own = set(rank_layers(student, planned.config.parallelism, rank))
    recompute, largest = planned.config.training.recompute, _output_weight(planned)
    again = recompute == "full"
    moments: dict[str, tuple[str, float]] = {
        "a layer's backward": (
            "all",
            max(
                activations.backward_workspace(planned, student, layer)
                + (activations.saved(planned, student, layer, None) if again else 0)
                for layer in own
            ),
        ),
    }
    if planned.is_first(rank):
        moments["the embedding's gradient"] = ("others", planned.item * largest)
    if teacher is not None:
        needs = [
            activations.forward_workspace(planned, teacher, x)
            for x in set(rank_layers(teacher, planned.config.parallelism, rank))
        ]
        moments["the teacher's forward"] = ("others", max(needs) + planned.item * planned.staged_layer(rank))
    if planned.is_last(rank):
        moments["the loss"] = ("all", fused_workspace(planned) if planned.fused else whole_workspace(planned))
        if not planned.fused:
            logits = planned.item * planned.tokens * columns(planned)
            hidden = planned.item * planned.tokens * student.hidden_size
            moments["the output layer's backward"] = ("all", logits + hidden + planned.item * largest)
    return moments


def columns(planned: PlannedRun) -> int:
    """Return the columns of a rank's logits."""
    return padded_vocab_size(planned.models.student.vocab_size) // planned.config.parallelism.tensor_model_parallel_size


def _output_weight(planned: PlannedRun) -> int:
    return columns(planned) * planned.models.student.hidden_size


def in_flight(planned: PlannedRun, rank: int) -> float:
    """Return the largest number of micro batches whose activations a rank holds, in Megatron's schedules."""
    par, count = planned.config.parallelism, planned.num_microbatches
    pipeline, virtual = par.pipeline_model_parallel_size, par.virtual_pipeline_model_parallel_size
    if virtual is None:
        return min(pipeline - rank, count)
    chunks = 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1
    return min(chunks, count * virtual) / virtual


def _saved(planned: PlannedRun, rank: int) -> tuple[float, float]:
    """Return the bytes saved for backward on a pipeline rank: by one micro batch, and by all that are in flight."""
    student, teacher = planned.models
    par, recompute = planned.config.parallelism, planned.config.training.recompute
    own = Counter(rank_layers(student, par, rank)).items()
    one = sum(number * activations.saved(planned, student, layer, recompute) for layer, number in own)
    if planned.is_last(rank):
        one += activations.final_norm(planned, student)
    width = student.hidden_size + (teacher.hidden_size if teacher else 0)
    sent_and_received = 2 * len(stages_of(par, rank)) - planned.is_first(rank) - planned.is_last(rank)
    one += sent_and_received * planned.item * planned.split_tokens * width
    return one, one * in_flight(planned, rank)


def fused_workspace(planned: PlannedRun) -> float:
    """Return the bytes of the fused loss: chunks of fp32 logits and hidden states of both models, one fp32 gradient.

    A softcap takes another chunk for its derivative. In place of a teacher's, there may be stored targets.
    """
    student, width = planned.models.student, planned.models.student.hidden_size + planned.teacher_width
    par, rows = planned.config.parallelism, chunk_rows(planned)
    logits = rows * columns(planned)
    buffers = min(1 if par.tensor_model_parallel_size == 1 else 2, -(-planned.tokens // rows))
    hidden = planned.item * planned.split_tokens * width
    if par.sequence_parallel:
        hidden += planned.item * planned.tokens * width  # gathered
    low_precision_gradient = 2 * logits if planned.item == 2 else 0
    slope = 0 if student.multipliers.softcap is None else 4 * logits
    sides = 2 if planned.teacher_width else 1
    chunks = buffers * 4 * sides * logits + slope + low_precision_gradient
    return chunks + hidden + 4 * planned.tokens * student.hidden_size + target_bytes(planned)


def target_bytes(planned: PlannedRun) -> float:
    """Return the bytes of a micro batch's stored targets."""
    if planned.stored is None:
        return 0
    fields = planned.stored.fields.values()
    return planned.tokens * sum(np.dtype(field.dtype).itemsize * prod(field.shape) for field in fields)


def chunk_rows(planned: PlannedRun) -> int:
    """Return the tokens of a chunk of logits, if every token is valid."""
    return chunk_size(planned.tokens, columns(planned), planned.on_gpu)


def whole_workspace(planned: PlannedRun) -> float:
    """Return the bytes of the student's whole logits, for a logits loss also the teacher's, and the losses' copies.

    Forward makes an fp32 copy for Megatron's cross entropy. Backward makes the gradient of the divergence, beside that
    copy if the LM loss is trained. Padding is cut off, which takes another gradient, or masked in copies. A
    softcap saves logits for backward, where it takes another gradient once the rest is freed.
    """
    student, teacher = planned.models
    kd, par = planned.config.distillation, planned.config.parallelism
    logits, copy = planned.item * planned.tokens * columns(planned), 4 * planned.tokens * columns(planned)
    capped = 0 if student.multipliers.softcap is None else logits
    if teacher is None or not planned.config.distillation.uses_logits:
        in_place = planned.item == 4 and teacher is None
        if in_place:
            return logits + 2 * capped
        return capped + (2 * logits if planned.item == 2 else logits) + copy
    backward = logits + (copy if kd.uses_lm_loss else 0)
    padded = padded_vocab_size(student.vocab_size) != student.vocab_size
    masked = 2 * logits if padded and par.tensor_model_parallel_size > 1 else 0
    if padded and not masked:
        backward += logits
    return 2 * logits + masked + capped + max(copy, backward)

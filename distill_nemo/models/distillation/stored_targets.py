"""A student that learns from stored targets: the teacher ran once, elsewhere, and is not built.

The last stage hands on the student's hidden states alone. The objective passes them to `losses/fused_linear`, with what
the micro batch brings of the teacher. Legend: S sequence, B batch, N = S B tokens, H width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from distill_nemo.config import DistillationConfig
from distill_nemo.losses.fused_linear.chunks import Head, TokenLogits
from distill_nemo.losses.stored import STORED_LOSSES, Codec
from distill_nemo.losses.stored.metrics import metrics_against_stored
from distill_nemo.losses.stored.rows import StoredRows
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.distillation.convert import attach, build_balancer
from distill_nemo.models.distillation.fused_output import (
    AgainstLogits,
    FusedOutput,
    Sides,
    configured_divergence,
    hand_on_hidden_states,
    quantises,
)
from distill_nemo.models.distillation.objective import Objective, Targets


@dataclass(frozen=True)
class StoredOutputLayer:
    """The teacher's output layer, of which each rank reads its rows.

    Args:
        rows: returns weight [n, H] and bias [n], or None, of the ids from a start to a stop.
        hidden_size: H.
        scale: factor of the logits.
        softcap: limit of the logits, if they are capped.
    """

    rows: Callable[[int, int], tuple[Tensor, Tensor | None]]
    hidden_size: int
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class StoredTeacher:
    """The teachers of a run's stores: the codec that their stores share.

    Args:
        codec: what is stored.
        temperature: T of the targets; "hidden" serves every temperature.
        num: K, draws or ids of a token; 0 with "hidden".
        vocab_size: V of the teachers' tokenizer.
        output_layer: of "hidden" only.
    """

    codec: Codec
    temperature: float
    num: int
    vocab_size: int
    output_layer: StoredOutputLayer | None = None


def learn_from_store(
    model: GPTModel, stored: StoredTeacher, distill_cfg: DistillationConfig, architecture: Architecture
) -> GPTModel:
    """Attach the objective to a pipeline stage of the student, until `convert.detach`.

    Raises:
        ValueError: if the student's output layer is quantised.
    """
    balancer = build_balancer(distill_cfg)
    if not model.post_process:
        attach(model, objective=_EarlierStage(balancer))
        return model
    if quantises(model.output_layer):
        raise ValueError(
            "the student's output layer is quantised, and stored targets need one that is fused with the losses: leave "
            "it out when you quantise the student, as ModelOpt's presets do, or set teacher and name token files"
        )
    objective: Objective
    if stored.output_layer is not None:
        divergence = configured_divergence(distill_cfg)
        objective = AgainstStoredStates(model, architecture, divergence, distill_cfg, balancer)
        objective.output_layer = stored.output_layer
    else:
        stored_loss = STORED_LOSSES[stored.codec](stored.temperature, stored.num)
        objective = AgainstStoredTargets(model, architecture, stored_loss, distill_cfg, balancer)
    attach(model, objective=objective, forward=MethodType(_forward, model))
    return model


def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the last hidden states in place of a loss; without labels, logits."""
    if kwargs.get("labels") is not None:
        kwargs["output_processor"] = hand_on_hidden_states
    return type(self).forward(self, *args, **kwargs)


class _EarlierStage(Objective):
    """A stage before the last one, which has a balancer to observe but neither loss nor metrics."""

    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Refuse: schedules ask the last stage."""
        raise NotImplementedError

    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Refuse: schedules ask the last stage."""
        raise NotImplementedError


class AgainstStoredTargets(FusedOutput[StoredRows]):
    """The logits loss against ids of the vocabulary, by codec "sampled" or "top_k". The output is [s, B, H]."""

    def sides(self, output: Tensor, targets: Targets) -> Sides[StoredRows]:
        """Return the student's head and the stored targets."""
        head, fields = self.student_head(output), _flat_fields(targets)
        has_targets_N = fields.pop("has_targets")
        return Sides(head, StoredRows(fields, self.fused_loss.vocab_start, head.weight_vH.shape[0]), has_targets_N)

    def compare(self, part: TokenLogits[StoredRows], labels_n: Tensor) -> dict[str, Tensor]:
        """Return the metrics that the stored numbers give."""
        loss = self.fused_loss
        return metrics_against_stored(part.student_nv, part.teacher, labels_n, loss.divergence, loss.group)


class AgainstStoredStates(AgainstLogits):
    """The logits loss against logits made of stored hidden states, with every divergence. The output is [s, B, H]."""

    output_layer: StoredOutputLayer
    _own_rows: tuple[Tensor, Tensor | None] | None = None  # on the device, from the first micro batch on

    def sides(self, output: Tensor, targets: Targets) -> Sides[Tensor]:
        """Return the student's head and the teacher's."""
        fields, layer = _flat_fields(targets), self.output_layer
        head = Head(fields["hidden"], *self._weights(output.device), layer.scale, layer.softcap)
        return Sides(self.student_head(output), head, fields["has_targets"])

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return this rank's rows of the teacher's output layer, with zeros for padding."""
        if self._own_rows is None:
            start, num_true = self.fused_loss.vocab_start, self.fused_loss.num_true
            width = self.student.output_layer.output_size_per_partition
            assert num_true is not None
            rows = self.output_layer.rows(start, start + num_true)
            weight_vH, bias_v = (None if x is None else _padded(x, width).to(device) for x in rows)
            assert weight_vH is not None
            self._own_rows = weight_vH, bias_v
        return self._own_rows


def _padded(x: Tensor, num_rows: int) -> Tensor:
    padded = x.new_zeros(num_rows, *x.shape[1:])
    padded[: len(x)] = x
    return padded


def _flat_fields(targets: Targets) -> dict[str, Tensor]:
    """Return the stored fields in the order of the hidden states, [N] or [N, ...] each."""
    assert targets.stored is not None, "the datasets give every batch of such a run its targets, or zeros"
    return {name: x.transpose(0, 1).flatten(0, 1) for name, x in targets.stored.items()}

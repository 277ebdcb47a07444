"""Objectives that fuse the output layers with the losses: whole logits never exist.

The last stage outputs hidden states, of student and teacher side by side as every other stage does, or of the student
alone (`stored_targets.py`). The objective passes them to `losses/fused_linear` with the weights of the output layers.
Megatron's `output_processor` makes a `GPTModel` end before its output layer.

Legend: S sequence (s: this rank's slice of it under sequence parallelism), B batch, N = S B tokens, H width.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from distill_nemo.balancers import LOGITS_PREFIX, STUDENT_LOSS
from distill_nemo.config import DistillationConfig
from distill_nemo.losses.divergence import Divergence, LogitsLoss
from distill_nemo.losses.divergences import choose_divergence
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head, Side, TokenLogits, ValidTokens, chunk_logits
from distill_nemo.losses.fused_linear.loss import Losses, fused_linear_losses
from distill_nemo.losses.metrics import METRICS, metrics_against_teacher
from distill_nemo.models.architecture import Architecture, Models, Multipliers
from distill_nemo.models.distillation.hidden_losses import HiddenLosses
from distill_nemo.models.distillation.objective import Balancer, Objective, Targets

Weight = float | Tensor


def hand_on_hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    """Return the hidden states in place of logits or a loss, as Megatron's `output_processor`."""
    return hidden_states


def why_not_fused(**models: Any) -> str | None:
    """Return the reason why the output layers of last stages, by role, cannot be fused with the losses, or None."""
    for name, model in models.items():
        layer = type(model.output_layer)
        if layer is not ColumnParallelLinear:
            return f"the {name}'s output layer is a {layer.__name__}, as after quantisation by ModelOpt"
    return None


def quantises(layer: nn.Module) -> bool:
    """Return True if quantisers of ModelOpt change what a layer computes. Its presets disable an output layer's."""
    if type(layer) is ColumnParallelLinear:
        return False
    from modelopt.torch.quantization.nn import TensorQuantizer

    return any(isinstance(part, TensorQuantizer) and part.is_enabled for part in layer.modules())


class Sides[Teacher](NamedTuple):
    """Both sides of the fused losses, in the order of the hidden states."""

    student: Head
    teacher: Side[Teacher]
    has_targets_N: Tensor | None = None  # 0 for tokens of which the teacher is not known, else 1; None: it always is


class FusedOutput[Teacher](Objective):
    """LM loss and logits loss, computed together with the student's output layer.

    Under tensor parallelism the gradient of the hidden states is summed in backward, as by Megatron's output layer: one
    all-reduce, under sequence parallelism one reduce-scatter, and one all-gather of each side in forward.

    Args:
        student: the last stage, a `GPTModel`.
        architecture: its architecture.
        logits_loss: the logits loss.
        distill_cfg: losses and their weights.
        balancer: weighs the losses.
        hidden_losses: hidden losses of this stage.
    """

    takes_hidden_states = True

    def __init__(
        self,
        student: GPTModel,
        architecture: Architecture,
        logits_loss: LogitsLoss[Teacher],
        distill_cfg: DistillationConfig,
        balancer: Balancer,
        hidden_losses: HiddenLosses | None = None,
    ) -> None:
        super().__init__(balancer, hidden_losses)
        self.student, self.multipliers = student, architecture.multipliers
        width = student.output_layer.output_size_per_partition
        start = parallel_state.get_tensor_model_parallel_rank() * width
        self.fused_loss = FusedLoss(
            logits_loss,
            factor=logits_loss.factor(distill_cfg.scale_by_temperature_squared),
            group=tensor_parallel_group(student),
            vocab_start=start,
            num_true=min(max(architecture.vocab_size - start, 0), width),
        )

    @abstractmethod
    def sides(self, output: Tensor, targets: Targets) -> Sides[Teacher]:
        """Return the student's head and what is known of the teacher."""

    @abstractmethod
    def compare(self, part: TokenLogits[Teacher], labels_n: Tensor) -> dict[str, Tensor]:
        """Return held-out metrics of some tokens, [n] each."""

    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total, and the sums to report.

        A balancer that has observed nothing derives its weights from the losses, too late for the gradient. This
        happens only for the first batch, which is run without gradients.
        """
        assert self.balancer is not None
        if self.balancer.knows_weights:
            lm_weight, logits_weight, _ = self.balancer.weights()
            losses = self._losses(output, targets, lm_weight, logits_weight)
            total = losses.total
        else:
            assert not torch.is_grad_enabled(), "let the balancer observe the first losses"
            losses = self._losses(output, targets, None, 0.0)
            total = self.balancer({STUDENT_LOSS: losses.lm, LOGITS_PREFIX: losses.logits})
        return total, {"lm_loss": losses.lm, "kd_loss": total, "logit_loss": losses.logits}

    @torch.no_grad()
    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the sums of `losses.metrics.METRICS`."""
        student, teacher, has_targets_N = self.sides(output, targets)
        valid = ValidTokens.of(student, teacher, *_flat(targets), targets.num_valid, has_targets_N)
        sums = {name: valid.weight_M.new_zeros(()) for name in METRICS}
        for part in chunk_logits(valid, self.fused_loss):
            for name, value_n in self.compare(part, valid.labels_M[part.rows]).items():
                weight_M = valid.weight_M if name == "lm_loss" else valid.kd_weight_M
                sums[name] = sums[name] + (value_n * weight_M[part.rows]).sum()
        return sums

    def _losses(
        self,
        output: Tensor,
        targets: Targets,
        lm_weight: float | Tensor | None,
        logits_weight: float | Tensor | None,
    ) -> Losses:
        weights = {"lm_weight": lm_weight, "logits_weight": logits_weight}
        given = {name: 0.0 if weight is None else weight for name, weight in weights.items()}  # None: left out
        loss = replace(self.fused_loss, **given, num_valid=targets.num_valid)
        student, teacher, has_targets_N = self.sides(output, targets)
        return fused_linear_losses(student, teacher, *_flat(targets), loss, has_targets_N)

    def student_head(self, hidden_sBH: Tensor) -> Head:
        """Return the student's last hidden states, of the whole sequence, with its output layer."""
        return head_of(self.student, whole(hidden_sBH, self.student.config.sequence_parallel), self.multipliers)


class AgainstLogits(FusedOutput[Tensor]):
    """The logits loss against a teacher's logits."""

    def set_losses(self, distill_cfg: DistillationConfig) -> None:
        """Take weights and temperature."""
        super().set_losses(distill_cfg)
        divergence = replace(self.fused_loss.divergence, temperature=distill_cfg.temperature)
        factor = divergence.factor(distill_cfg.scale_by_temperature_squared)
        self.fused_loss = replace(self.fused_loss, divergence=divergence, factor=factor)

    def compare(self, part: TokenLogits[Tensor], labels_n: Tensor) -> dict[str, Tensor]:
        """Return `losses.metrics.METRICS`."""
        group, vocab_start = self.fused_loss.group, self.fused_loss.vocab_start
        return metrics_against_teacher(part.student_nv, part.teacher, labels_n, group, vocab_start)


class FusedLogits(AgainstLogits):
    """The logits loss against a teacher that runs beside the student. The output is [s, B, both H side by side].

    Args:
        student: the last stage, a `GPTModel`.
        teacher: the same.
        distill_cfg: losses and their weights.
        models: architectures of both.
        balancer: weighs the losses.
        hidden_losses: hidden losses of this stage.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        distill_cfg: DistillationConfig,
        models: Models,
        balancer: Balancer,
        hidden_losses: HiddenLosses,
    ) -> None:
        assert models.teacher is not None
        divergence = configured_divergence(distill_cfg)
        super().__init__(student, models.student, divergence, distill_cfg, balancer, hidden_losses)
        self.teacher, self.teachers_multipliers = teacher, models.teacher.multipliers

    def sides(self, output: Tensor, targets: Targets) -> Sides[Tensor]:
        """Return both heads."""
        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        student_sBH, teacher_sBH = output.split(widths, dim=-1)
        teacher_SBH = whole(teacher_sBH.detach(), self.student.config.sequence_parallel)
        teacher = head_of(self.teacher, teacher_SBH, self.teachers_multipliers)
        return Sides(self.student_head(student_sBH), teacher)


def _flat(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return labels and mask in the order of the hidden states, [N] each."""
    return targets.labels_BS.transpose(0, 1).flatten(), targets.loss_mask_BS.transpose(0, 1).flatten()


def whole(hidden_sBH: Tensor, sequence_parallel: bool) -> Tensor:
    """Return [S, B, H] on every tensor-parallel rank; the gradients of all are summed in backward."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_sBH, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden_sBH)


def head_of(model: Any, hidden_SBH: Tensor, multipliers: Multipliers) -> Head:
    """Return hidden states [S, B, H] with the model's output layer."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return Head(hidden_SBH.flatten(0, 1), weight, model.output_layer.bias, multipliers.logits, multipliers.softcap)


def tensor_parallel_group(student: GPTModel) -> dist.ProcessGroup | None:
    """Return the ranks that share the vocabulary, or None if this rank has all of it."""
    if student.config.tensor_model_parallel_size == 1:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def configured_divergence(distill_cfg: DistillationConfig) -> Divergence:
    """Return the divergence from a teacher's logits."""
    return choose_divergence(distill_cfg.divergence, distill_cfg.temperature, distill_cfg.beta, distill_cfg.top_k)

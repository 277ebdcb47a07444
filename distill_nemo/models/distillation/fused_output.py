"""The objective of a distillation model whose output layers are fused with the losses: whole logits never exist.

The last stage outputs the hidden states of student and teacher side by side, as every other stage does. The objective
passes them to `losses/fused_linear` with the weights of both output layers. Megatron's `output_processor` makes a
`GPTModel` end before its output layer.

Legend: S sequence (s: this rank's slice of it under sequence parallelism), B batch, N = S B tokens, H width.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from distill_nemo.balancers import LOGITS_PREFIX, STUDENT_LOSS
from distill_nemo.config import DistillationConfig
from distill_nemo.losses.divergences import choose_divergence
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head, ValidTokens, chunk_logits
from distill_nemo.losses.fused_linear.loss import Losses, fused_linear_losses
from distill_nemo.losses.metrics import METRICS, metrics_against_teacher
from distill_nemo.models.architecture import Models, Multipliers
from distill_nemo.models.distillation.hidden_losses import HiddenLosses
from distill_nemo.models.distillation.objective import Balancer, Objective, Targets

Weight = float | Tensor


def hand_on_hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    """Return the hidden states in place of logits or a loss, as Megatron's `output_processor`."""
    return hidden_states


def why_not_fused(student: Any, teacher: Any) -> str | None:
    """Return the reason why the output layers of a last stage cannot be fused, or None."""
    for name, model in (("student", student), ("teacher", teacher)):
        layer = type(model.output_layer)
        if layer is not ColumnParallelLinear:
            return f"the {name}'s output layer is a {layer.__name__}, as after quantisation by ModelOpt"
    return None


class FusedLogits(Objective):
    """LM loss and logits loss, computed together with the output layers of student and teacher.

    The output is [s, B, student's H + teacher's H]. Under tensor parallelism the gradient of the hidden states is
    summed in backward, as by Megatron's output layer: one all-reduce, under sequence parallelism one reduce-scatter,
    and one all-gather of each side in forward.

    Args:
        student: the last stage, a `GPTModel`.
        teacher: the same.
        distill_cfg: losses and their weights.
        models: architectures of both.
        group: the ranks that share the vocabulary, or None.
        balancer: weighs the losses.
        hidden_losses: hidden losses of this stage.
    """

    takes_hidden_states = True

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        distill_cfg: DistillationConfig,
        models: Models,
        group: dist.ProcessGroup | None,
        balancer: Balancer,
        hidden_losses: HiddenLosses,
    ) -> None:
        super().__init__(balancer, hidden_losses)
        assert models.teacher is not None
        self.student, self.teacher = student, teacher
        self.multipliers = models.student.multipliers, models.teacher.multipliers
        width = student.output_layer.output_size_per_partition
        start = parallel_state.get_tensor_model_parallel_rank() * width
        self.fused_loss = FusedLoss(
            choose_divergence(distill_cfg.divergence, distill_cfg.temperature, distill_cfg.beta, distill_cfg.top_k),
            factor=distill_cfg.temperature**2 if distill_cfg.scale_by_temperature_squared else 1.0,
            group=group,
            vocab_start=start,
            num_true=min(max(models.student.vocab_size - start, 0), width),
        )

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
        labels_N, loss_mask_N = _flat(targets)
        valid = ValidTokens.of(*self._heads(output), labels_N, loss_mask_N, targets.num_valid)
        sums = {name: valid.weight_M.new_zeros(()) for name in METRICS}
        group, vocab_start = self.fused_loss.group, self.fused_loss.vocab_start
        for rows, z_nv, t_nv in chunk_logits(valid, self.fused_loss):
            each = metrics_against_teacher(z_nv, t_nv, valid.labels_M[rows], group, vocab_start)
            sums = {name: sums[name] + (value_n * valid.weight_M[rows]).sum() for name, value_n in each.items()}
        return sums

    def _losses(
        self,
        hidden_sBW: Tensor,
        targets: Targets,
        lm_weight: float | Tensor | None,
        logits_weight: float | Tensor | None,
    ) -> Losses:
        weights = {"lm_weight": lm_weight, "logits_weight": logits_weight}
        given = {name: 0.0 if weight is None else weight for name, weight in weights.items()}  # None: left out
        loss = replace(self.fused_loss, **given, num_valid=targets.num_valid)
        return fused_linear_losses(*self._heads(hidden_sBW), *_flat(targets), loss)

    def _heads(self, hidden_sBW: Tensor) -> tuple[Head, Head]:
        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        student_sBH, teacher_sBH = hidden_sBW.split(widths, dim=-1)
        student_SBH = _whole(student_sBH, self.student.config.sequence_parallel)
        teacher_SBH = _whole(teacher_sBH.detach(), self.student.config.sequence_parallel)
        student, teacher = self.multipliers
        return _head(self.student, student_SBH, student), _head(self.teacher, teacher_SBH, teacher)


def _flat(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return labels and mask in the order of the hidden states, [N] each."""
    return targets.labels_BS.transpose(0, 1).flatten(), targets.loss_mask_BS.transpose(0, 1).flatten()


def _whole(hidden_sBH: Tensor, sequence_parallel: bool) -> Tensor:
    """Return [S, B, H] on every tensor-parallel rank; the gradients of all are summed in backward."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_sBH, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden_sBH)


def _head(model: Any, hidden_SBH: Tensor, multipliers: Multipliers) -> Head:
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return Head(hidden_SBH.flatten(0, 1), weight, model.output_layer.bias, multipliers.logits, multipliers.softcap)

"""The losses of a distillation model whose output layers are part of the loss: its logits never exist as a whole.

The last stage hands on what every other stage does, the hidden states of student and teacher side by side; the loss
function gives them to `losses/fused_linear` with the weights of both output layers. Megatron's `output_processor` is
what makes a `GPTModel` end before its output layer.

Legend: S sequence (s: this rank's slice of it under sequence parallelism), B batch, N = S B tokens, H width.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from distill_nemo.config import DistillationConfig
from distill_nemo.losses.divergences import choose_divergence
from distill_nemo.losses.fused_linear.chunks import FusedLoss, Head, ValidTokens, chunk_logits
from distill_nemo.losses.fused_linear.loss import Losses, fused_linear_losses
from distill_nemo.losses.metrics import METRICS, metrics_against_teacher


def hand_on_hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    """Megatron's `output_processor`: neither logits nor a loss."""
    return hidden_states


def why_not_fused(student: Any, teacher: Any) -> str | None:
    """What keeps these models of the last stage from it, or None."""
    for name, model in (("student", student), ("teacher", teacher)):
        layer = type(model.output_layer)
        if layer is not ColumnParallelLinear:
            return f"the {name}'s output layer is a {layer.__name__}, as after quantisation by ModelOpt"
    return None


class FusedOutput:
    """What the last stage computes of hidden states.

    Args:
        student: the last stage, a `GPTModel`.
        teacher: the same.
        distill_cfg: what to learn.
        vocab_size: the true vocabulary.
        group: the ranks that share the vocabulary, or None.
    """

    def __init__(
        self, student: Any, teacher: Any, distill_cfg: DistillationConfig, vocab_size: int, group: Any
    ) -> None:
        self.student, self.teacher = student, teacher
        width = student.output_layer.output_size_per_partition
        start = parallel_state.get_tensor_model_parallel_rank() * width
        self.settings: dict[str, Any] = {
            "divergence": choose_divergence(
                distill_cfg.divergence, distill_cfg.temperature, distill_cfg.beta, distill_cfg.top_k
            ),
            "factor": distill_cfg.temperature**2 if distill_cfg.scale_by_temperature_squared else 1.0,
            "group": group,
            "vocab_start": start,
            "num_true": min(max(vocab_size - start, 0), width),
        }

    def losses(
        self,
        hidden_sBW: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        lm_weight: float | Tensor,
        logits_weight: float | Tensor,
        num_valid: int | None,
    ) -> Losses:
        """Sums over valid tokens, and the weighted one to differentiate.

        Under tensor parallelism the gradient of the hidden states is summed in backward, as by Megatron's output layer:
        one all-reduce, under sequence parallelism one reduce-scatter, and one all-gather of each side in forward.

        Args:
            hidden_sBW: [s, B, student's H + teacher's H].
            labels_BS: [B, S].
            loss_mask_BS: [B, S].
            lm_weight: of the LM loss.
            logits_weight: of the logits loss.
            num_valid: tokens with a positive mask, where the host knows it.
        """
        loss = FusedLoss(**self.settings, lm_weight=lm_weight, logits_weight=logits_weight, num_valid=num_valid)
        labels_N, loss_mask_N = (x.transpose(0, 1).flatten() for x in (labels_BS, loss_mask_BS))
        return fused_linear_losses(*self._heads(hidden_sBW), labels_N, loss_mask_N, loss)

    @torch.no_grad()
    def figures(
        self, hidden_sBW: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, num_valid: int | None
    ) -> dict[str, Tensor]:
        """Sums over valid tokens of `losses.metrics.metrics_against_teacher`."""
        loss, (student, teacher) = FusedLoss(**self.settings), self._heads(hidden_sBW)
        labels_N, loss_mask_N = (x.transpose(0, 1).flatten() for x in (labels_BS, loss_mask_BS))
        valid = ValidTokens.of(student, teacher, labels_N, loss_mask_N, num_valid)
        sums = {name: valid.weight_M.new_zeros(()) for name in METRICS}
        for rows, z_nv, t_nv in chunk_logits(valid, loss):
            each = metrics_against_teacher(z_nv, t_nv, valid.labels_M[rows], loss.group, loss.vocab_start)
            sums = {name: sums[name] + (value_n * valid.weight_M[rows]).sum() for name, value_n in each.items()}
        return sums

    def _heads(self, hidden_sBW: Tensor) -> tuple[Head, Head]:
        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        student_sBH, teacher_sBH = hidden_sBW.split(widths, dim=-1)
        student_SBH = _whole(student_sBH, self.student.config.sequence_parallel)
        teacher_SBH = _whole(teacher_sBH.detach(), self.student.config.sequence_parallel)
        return _head(self.student, student_SBH), _head(self.teacher, teacher_SBH)


def _whole(hidden_sBH: Tensor, sequence_parallel: bool) -> Tensor:
    """[S, B, H] on every tensor-parallel rank; the gradients of all are summed in backward."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_sBH, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden_sBH)


def _head(model: Any, hidden_SBH: Tensor) -> Head:
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return Head(hidden_SBH.flatten(0, 1), weight, model.output_layer.bias)

"""One micro batch: the forward step and the loss function, in the contract of Megatron's schedules.

Legend: B batch, S sequence. A `report` maps a metric to a tensor `[sum over valid tokens, valid tokens]` of this
micro batch and data-parallel rank; `evaluation.reduce_reports` makes global token means of them.
"""

from functools import partial
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from distill_nemo.balancers import LOGITS_PREFIX, STUDENT_LOSS
from distill_nemo.evaluation import Batches, LossFunc, Report, counted, run_model
from distill_nemo.losses.reduction import masked_sum


def forward_step(data_iterator: Batches, model: nn.Module) -> tuple[Tensor, LossFunc]:
    """Run the model on the next micro batch; the schedule calls the returned loss function on the last stage."""
    batch, num_counted, output = run_model(data_iterator, model)
    return output, partial(loss_func, batch["loss_mask"], model, labels=batch["labels"], num_counted=num_counted)


def loss_func(
    loss_mask: Tensor, model: nn.Module, output_tensor: Tensor, labels: Tensor, num_counted: int | None = None
) -> tuple[Tensor, Tensor, Report]:
    """Masked token sums; the schedule divides by the global number of valid tokens (`calculate_per_token_loss`).

    Args:
        loss_mask: [B, S], 1 where a token counts.
        model: the (wrapped) student or distillation model that made `output_tensor`.
        output_tensor: [B, S], the LM loss of each token; with a fused output the hidden states of student and teacher
            side by side.
        labels: [B, S].
        num_counted: tokens with a positive mask, where the host knows it.

    Returns:
        The loss to differentiate (a sum over tokens), the number of valid tokens (int), and the report. Hidden losses
        are not in it: they are differentiated and counted where their layers are (`distillation.hidden_losses`).
    """
    unwrapped: Any = unwrap_model(model)
    num_tokens = loss_mask.sum()
    if getattr(unwrapped, "fused_output", None) is not None:
        batch = output_tensor, labels, loss_mask
        loss, report = _fused(unwrapped, batch, num_counted)
        return loss, num_tokens.int(), counted(report, num_tokens)
    lm_sum = masked_sum(output_tensor, loss_mask)
    report = {"lm_loss": lm_sum}
    loss = lm_sum
    if isinstance(unwrapped, mtd.DistillationModel):
        losses: Any = unwrapped.compute_kd_loss(
            student_loss=lm_sum, loss_reduction_fn=lambda x: masked_sum(x, loss_mask), skip_balancer=True
        )
        assert unwrapped.loss_balancer is not None
        loss = unwrapped.loss_balancer(losses)
        report |= _distillation_report(losses, loss)
    return loss, num_tokens.int(), counted(report, num_tokens)


def _fused(
    model: Any, batch: tuple[Tensor, Tensor, Tensor], num_counted: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to differentiate, and the sums to report.

    A balancer that has observed nothing weighs by losses that are not known before the gradient would be: that is for
    the first batch, without gradients.
    """
    balancer = model.loss_balancer
    knows = getattr(balancer, "observed", {}) is not None
    assert knows or not torch.is_grad_enabled(), "let the balancer observe the first losses"
    lm_weight, logits_weight, _ = balancer.weights() if knows else (None, 0.0, None)
    lm_weight = 0.0 if lm_weight is None else lm_weight  # left out
    losses = model.fused_output.losses(*batch, lm_weight, logits_weight, num_counted)
    loss = losses.total if knows else balancer({STUDENT_LOSS: losses.lm, LOGITS_PREFIX: losses.logits})
    return loss, {"lm_loss": losses.lm, "kd_loss": loss, "logit_loss": losses.logits}


def _distillation_report(losses: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    logit = [value for name, value in losses.items() if name.startswith(LOGITS_PREFIX)]
    return {"kd_loss": loss} | ({"logit_loss": torch.stack(logit).sum()} if logit else {})

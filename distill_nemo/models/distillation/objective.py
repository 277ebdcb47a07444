"""Objectives, which turn the output of the last pipeline stage into a loss to differentiate, and into metrics.

`model_provider` chooses one for each stage; training and evaluation ask the model for it.

Legend: B batch, S sequence.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.utils import unwrap_model
from modelopt.torch.distill import DistillationModel
from torch import Tensor, nn

from distill_nemo.balancers import LOGITS_PREFIX, LogitsAndIntermediatesLossBalancer, WeightedLossBalancer
from distill_nemo.config import DistillationConfig
from distill_nemo.losses.logits import LogitsKLLoss
from distill_nemo.losses.metrics import metrics_against_teacher
from distill_nemo.losses.reduction import masked_sum
from distill_nemo.models.distillation.hidden_losses import HiddenLosses

Balancer = WeightedLossBalancer | LogitsAndIntermediatesLossBalancer


class Targets(NamedTuple):
    """The tokens of a micro batch to predict."""

    labels_BS: Tensor
    loss_mask_BS: Tensor  # positive where a token is valid
    num_valid: int | None = None  # tokens with a positive mask, where the host knows it
    stored: dict[str, Tensor] | None = None  # a teacher's targets, [B, S] or [B, S, ...] each


class Objective(ABC):
    """The loss and the metrics of a model. Every sum is over valid tokens of the micro batch.

    Args:
        balancer: gives the weights of the losses; None if there is only one.
        hidden_losses: hidden losses of this stage, differentiated and summed at their layers; None: there are none.
    """

    takes_hidden_states: ClassVar[bool] = False  # the last stage ends before its output layer

    def __init__(self, balancer: Balancer | None = None, hidden_losses: HiddenLosses | None = None) -> None:
        self.balancer, self.hidden_losses = balancer, hidden_losses

    def set_losses(self, distill_cfg: DistillationConfig) -> None:
        """Take the weights of the losses from `distill_cfg`, and the temperature where the teacher's logits are known.

        Hidden losses share the balancer, and so the weights.
        """
        if isinstance(self.balancer, WeightedLossBalancer):
            self.balancer.set_weights(distill_cfg.lm_weight, distill_cfg.logits_weight, distill_cfg.hidden_weight)
        elif self.balancer is not None:
            self.balancer.kd_loss_scale = distill_cfg.kd_loss_scale

    @abstractmethod
    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum to differentiate, and the sums to report."""

    @abstractmethod
    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the sums of the held-out metrics, `lm_loss` among them."""


class LanguageModelling(Objective):
    """The LM loss alone; the output is the loss of each token, [B, S]."""

    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the LM loss."""
        lm_sum = masked_sum(output, targets.loss_mask_BS)
        return lm_sum, {"lm_loss": lm_sum}

    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the LM loss."""
        return {"lm_loss": masked_sum(output, targets.loss_mask_BS)}


class WholeLogits(Objective):
    """LM loss, and logits loss of the logits that ModelOpt's hooks have captured. The output is [B, S].

    Args:
        model: the distillation model.
        logits_loss: logits loss; None if it has no weight, or this is not the last stage.
        balancer: weighs the losses.
        hidden_losses: hidden losses of this stage.
    """

    def __init__(
        self,
        model: DistillationModel,
        logits_loss: LogitsKLLoss | None,
        balancer: Balancer,
        hidden_losses: HiddenLosses,
    ) -> None:
        super().__init__(balancer, hidden_losses)
        self.model: Any = model
        self.logits_loss = logits_loss

    def set_losses(self, distill_cfg: DistillationConfig) -> None:
        """Take weights and temperature."""
        super().set_losses(distill_cfg)
        if self.logits_loss is not None:
            self.logits_loss.set_temperature(distill_cfg.temperature)

    def loss(self, output: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the balancer's weighted total of the losses, and the sums to report."""
        assert self.balancer is not None
        lm_sum = masked_sum(output, targets.loss_mask_BS)
        losses: dict[str, Tensor] = self.model.compute_kd_loss(
            student_loss=lm_sum,
            loss_reduction_fn=lambda x: masked_sum(x, targets.loss_mask_BS),
            skip_balancer=True,
        )
        total = self.balancer(losses)
        report = {"lm_loss": lm_sum, "kd_loss": total}
        logits = [value for name, value in losses.items() if name.startswith(LOGITS_PREFIX)]
        return total, report | ({"logit_loss": torch.stack(logits).sum()} if logits else {})

    def metrics(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the LM loss and, from the captured logits, `losses.metrics.METRICS`."""
        report = {"lm_loss": masked_sum(output, targets.loss_mask_BS)}
        if self.logits_loss is None:
            return report
        layers = self.model.output_layer, self.model.teacher_model.output_layer
        student, teacher = (layer._intermediate_output for layer in layers)
        pair = self.logits_loss.prepare(student, teacher)
        labels_SB = targets.labels_BS.transpose(0, 1)
        found_SB = metrics_against_teacher(*pair, labels_SB, self.logits_loss.group, self.logits_loss.vocab_start)
        for layer in layers:
            layer._intermediate_output = None
        return report | {n: masked_sum(x_SB.transpose(0, 1), targets.loss_mask_BS) for n, x_SB in found_SB.items()}


def objective_of(model: nn.Module) -> Objective:
    """Return the objective of a model that `model_provider` has built, wrapped or not."""
    return vars(unwrap_model(model))["objective"]

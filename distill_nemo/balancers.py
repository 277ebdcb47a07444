"""How the losses of one micro batch become the one that is differentiated."""

import modelopt.torch.distill as mtd
import torch
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from torch import Tensor

STUDENT_LOSS = STUDENT_LOSS_KEY
LOGITS_PREFIX = "Logits"  # loss classes on logits are named so; ModelOpt keys losses by class name


class WeightedLossBalancer(mtd.DistillationLossBalancer):
    """lm_weight * student_loss + logits_weight * sum(logit losses) + hidden_weight * mean(hidden losses).

    Linear, so exact under any data-parallel layout and micro batch size.
    """

    def __init__(self, lm_weight: float = 0.0, logits_weight: float = 1.0, hidden_weight: float = 0.0) -> None:
        super().__init__()
        self.lm_weight, self.logits_weight, self.hidden_weight = lm_weight, logits_weight, hidden_weight

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """The weighted sum; a missing term counts as zero."""
        student, logits, hidden = split_losses(loss_dict)
        return self.lm_weight * student + self.logits_weight * logits + self.hidden_weight * hidden


class LogitsAndIntermediatesLossBalancer(mtd.DistillationLossBalancer):
    """Scale the distillation losses to the size of the student's own loss, as ModelOpt's balancer of this name does.

    total = student + kd_loss_scale * s2 * (logits + s1 * hidden), where hidden is the mean of the hidden losses,
    s1 = logits / hidden and s2 = student / (logits + s1 * hidden), both detached. With `skip_original_loss` the total
    is logits + s1 * hidden.

    Args:
        kd_loss_scale: size of the distillation loss relative to the student's.
        skip_original_loss: leave the student's own loss out.
        max_amplification: limit of s1 and s2. Without it a student that has all but caught up (KL 1e-4 against an LM
            loss of 2) would train on noise, 20,000 times amplified.
    """

    def __init__(
        self, kd_loss_scale: float = 1.0, skip_original_loss: bool = False, max_amplification: float = 100.0
    ) -> None:
        super().__init__()
        self.kd_loss_scale, self.skip_original_loss = kd_loss_scale, skip_original_loss
        self.max_amplification = max_amplification

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """The balanced scalar; zero or missing terms give zero. No host sync: the branches are `torch.where`."""
        student, logits, hidden = split_losses(loss_dict)
        has_logits = any(name.startswith(LOGITS_PREFIX) for name in loss_dict)
        kd = logits + (self._ratio(logits, hidden) if has_logits else 1.0) * hidden
        if self.skip_original_loss:
            return kd
        if STUDENT_LOSS not in loss_dict:
            return self.kd_loss_scale * kd
        return student + self.kd_loss_scale * self._ratio(student, kd) * kd

    def _ratio(self, target: Tensor, loss: Tensor) -> Tensor:
        target, loss = target.detach(), loss.detach()
        usable = (target > 0) & (loss > 0)
        ratio = target / torch.where(usable, loss, 1.0)
        return torch.where(usable, ratio.clamp(max=self.max_amplification), 0.0)


def split_losses(loss_dict: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The student's own loss, the sum of the logit losses, the mean of the hidden losses; zero where there is none."""
    assert loss_dict, "no losses to balance"
    zero = next(iter(loss_dict.values())).new_zeros(())
    logits = [loss for name, loss in loss_dict.items() if name.startswith(LOGITS_PREFIX)]
    hidden = [v for name, v in loss_dict.items() if name != STUDENT_LOSS and not name.startswith(LOGITS_PREFIX)]
    return (
        loss_dict.get(STUDENT_LOSS, zero),
        torch.stack(logits).sum() if logits else zero,
        torch.stack(hidden).mean() if hidden else zero,
    )

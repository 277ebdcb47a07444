"""How the student's own loss and the distillation losses become one scalar to differentiate.

A balancer gets scalars by name, as ModelOpt makes them: `student_loss`, and for each loss module its class name and
number (`LogitsKLLoss_0`, `HiddenStateCosineLoss_1`). Class names that start with `Logits` are logits losses, the others
intermediate losses. Logits losses are added up, intermediate losses averaged. The dict is left as it is.
"""

import torch
from modelopt.torch.distill import DistillationLossBalancer
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY as STUDENT_LOSS
from torch import Tensor

LOGITS_PREFIX = "Logits"


class LogitsAndIntermediatesLossBalancer(DistillationLossBalancer):
    """Scales the distillation losses to the size of the student's own loss, anew in every call.

    `kd = logits + intermediate * scale(logits / intermediate)`
    `total = student + kd * scale(student / kd) * kd_loss_scale`, or `kd` alone where the student loss is missing or
    skipped: there is nothing to scale it to, and scaled to the student loss it could never shrink.

    Scales are constants for autograd, 0 where their denominator is 0 (so a term that vanishes stays zero, with a finite
    gradient), and at most `max_amplification`. No value is read by the host.

    The default limit is 10. A KL divergence vanishes as the square of its gradient, so the gradient of
    `kd * student / kd` grows without bound as the student gets good (2.0 against 1e-4 would be 20,000x); with a limit A
    it peaks near sqrt(student * A), single digits for 10, and below student / A the divergence fades out as it
    should. Still, a KL of 0.2 against an LM loss of 2.0 gets its full scale.

    Args:
        kd_loss_scale: size of the distillation part relative to the student loss.
        skip_original_loss: leave the student loss out.
        max_amplification: upper limit of each scale.

    Raises:
        ValueError: when `max_amplification` is not positive or `kd_loss_scale` is negative.
    """

    def __init__(
        self, kd_loss_scale: float = 1.0, skip_original_loss: bool = False, max_amplification: float = 10.0
    ) -> None:
        super().__init__()
        if not kd_loss_scale >= 0:
            raise ValueError(f"kd_loss_scale must not be negative, got {kd_loss_scale}")
        if not max_amplification > 0:
            raise ValueError(f"max_amplification must be positive, got {max_amplification}")
        self.kd_loss_scale = kd_loss_scale
        self.skip_original_loss = skip_original_loss
        self.max_amplification = max_amplification

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """Scalars by name -> the scalar to differentiate.

        Raises:
            ValueError: for a loss that is not a scalar.
        """
        student, logits, intermediate = split_losses(self, loss_dict)
        if logits is not None and intermediate is not None:
            intermediate = intermediate * self._scale(logits, intermediate)
        kd = _sum(logits, intermediate)
        if student is None or self.skip_original_loss:
            return kd
        return student + kd * (self._scale(student, kd) * self.kd_loss_scale)

    def _scale(self, target: Tensor, source: Tensor) -> Tensor:
        target, source = target.detach(), source.detach()
        positive = torch.where(source > 0, source, 1.0)
        scale = torch.where(source > 0, target / positive, 0.0)
        return scale.clamp(max=self.max_amplification)


class WeightedLossBalancer(DistillationLossBalancer):
    """`lm_weight * student + logits_weight * logits + hidden_weight * mean(intermediate)`.

    Linear, so sums over micro batches and data-parallel ranks are exact in any layout. Missing losses count as zero.

    Args:
        lm_weight: weight of the student's own loss.
        logits_weight: weight of the logits loss.
        hidden_weight: weight of the mean of the intermediate losses.

    Raises:
        ValueError: for a negative weight, or when all are zero.
    """

    def __init__(self, lm_weight: float = 0.0, logits_weight: float = 1.0, hidden_weight: float = 0.0) -> None:
        super().__init__()
        weights = {"lm_weight": lm_weight, "logits_weight": logits_weight, "hidden_weight": hidden_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all zero: nothing would be learnt; set one above zero")
        self.weights = tuple(weights.values())

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """Scalars by name -> the scalar to differentiate.

        Raises:
            ValueError: for a loss that is not a scalar.
        """
        losses = split_losses(self, loss_dict)
        return _sum(*(x if x is None else w * x for w, x in zip(self.weights, losses, strict=True)))


def split_losses(
    balancer: DistillationLossBalancer, loss_dict: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(student loss, sum of logits losses, mean of intermediate losses), each None where missing."""
    losses = dict(loss_dict)
    student = losses.pop(STUDENT_LOSS, None)
    if student is not None and balancer._student_loss_reduction_fn is not None:
        student = balancer._student_loss_reduction_fn(student)
    for name, value in [(STUDENT_LOSS, student), *losses.items()]:
        if value is not None and value.dim() != 0:
            raise ValueError(f'loss "{name}" has shape {list(value.shape)}; reduce it to a scalar first')
    logits = [value for name, value in losses.items() if name.startswith(LOGITS_PREFIX)]
    intermediate = [value for name, value in losses.items() if not name.startswith(LOGITS_PREFIX)]
    return (
        student,
        torch.stack(logits).sum() if logits else None,
        torch.stack(intermediate).mean() if intermediate else None,
    )


def _sum(*terms: Tensor | None) -> Tensor:
    present = [term for term in terms if term is not None]
    return torch.stack(present).sum() if present else torch.zeros(())

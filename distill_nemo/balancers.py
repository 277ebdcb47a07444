"""Balancers: the student's own loss and the distillation losses become one scalar to differentiate.

A balancer gets scalars by name, as ModelOpt makes them: `student_loss`, and for each loss module its class name and
number (`LogitsKLLoss_0`, `HiddenStateCosineLoss_1`). Class names that start with `Logits` are logits losses, the others
intermediate losses. Logits losses are added up, intermediate losses averaged. The dict is left as it is.
"""

from typing import Any

import torch
from modelopt.torch.distill import DistillationLossBalancer
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY as STUDENT_LOSS
from torch import Tensor

LOGITS_PREFIX = "Logits"

ThreeLosses = tuple[Tensor | None, Tensor | None, Tensor | None]  # student, logits, intermediate


class LogitsAndIntermediatesLossBalancer(DistillationLossBalancer):
    """Balancer that scales the distillation losses to the size of the student's own loss.

    `kd = logits + intermediate * scale(logits / intermediate)`
    `total = student + kd * scale(student / kd) * kd_loss_scale`, or `kd` alone if the student loss is missing or
    skipped. Scaled to a skipped student loss, `kd` could never shrink.

    Scales are constants for autograd, and at most `max_amplification`, which is also the scale where the denominator is
    not positive: a loss of zero stays zero with a finite gradient, and a loss estimated from draws may be negative by
    chance. The host reads no value.

    Scales come from the losses of the call, as ModelOpt's do, or after `observe` from the observed losses. Training
    observes the global means of the previous step. All ranks and pipeline stages then use the same scales, and within
    a step the total is linear in the losses, so it is exact under any layout and micro batch size.

    The default limit is 10. A KL divergence vanishes as the square of its gradient, so the gradient of
    `kd * student / kd` grows without bound as the student improves: 2.0 against 1e-4 would be 20,000x. With a limit A
    it peaks near sqrt(student * A), single digits for 10, and below student / A the divergence fades out as it
    should. A KL of 0.2 against an LM loss of 2.0 still gets its full scale.

    Args:
        kd_loss_scale: size of the distillation part relative to the student loss.
        skip_original_loss: leave the student loss out.
        max_amplification: upper limit of each scale.

    Raises:
        ValueError: if `max_amplification` is not positive or `kd_loss_scale` is negative.
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
        self.observed: dict[str, float] | None = None

    def observe(self, means: dict[str, float]) -> None:
        """Take the scales from these means from now on: `lm_loss`, `logit_loss` and `hidden_loss`.

        A loss that is missing keeps its last mean. Until one of the distillation losses has been seen, they are taken
        to be as large as the student's.
        """
        names = ("lm_loss", "logit_loss", "hidden_loss")
        self.observed = (self.observed or {}) | {name: float(means[name]) for name in names if name in means}

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """Return the scalar to differentiate from scalars by name.

        Raises:
            ValueError: for a loss that is not a scalar.
        """
        losses = split_losses(self, loss_dict)
        return _weighted_sum(self._weights(losses) if self.observed is None else self.weights(), losses)

    @property
    def knows_weights(self) -> bool:
        """True if `weights` are known before the losses, from observed ones."""
        return self.observed is not None

    def weights(self) -> ThreeLosses:
        """Return the weights of student (None: left out), logits and mean intermediate loss by the observed losses."""
        assert self.observed is not None, "observe the losses first"
        found = (self.observed.get(name) for name in ("lm_loss", "logit_loss", "hidden_loss"))
        student, logits, intermediate = (None if value is None else torch.tensor(value) for value in found)
        return self._weights((student, logits, intermediate))

    def _weights(self, losses: ThreeLosses) -> ThreeLosses:
        student, logits, intermediate = (None if loss is None else loss.detach() for loss in losses)
        share = torch.ones(())
        if logits is not None and intermediate is not None:
            share = self._scale(logits, intermediate)
            intermediate = intermediate * share
        if student is None or self.skip_original_loss:
            return None, torch.ones(()), share
        known = logits is not None or intermediate is not None
        scale = self._scale(student, _sum(logits, intermediate)) if known else torch.ones(())
        scale = scale * self.kd_loss_scale
        return torch.ones(()), scale, scale * share

    def _scale(self, target: Tensor, source: Tensor) -> Tensor:
        positive = torch.where(source > 0, source, 1.0)
        scale = torch.where(source > 0, target / positive, torch.inf)
        return scale.clamp(max=self.max_amplification)


class WeightedLossBalancer(DistillationLossBalancer):
    """Balancer with fixed weights: `lm_weight * student + logits_weight * logits + hidden_weight * mean(intermediate)`.

    The total is linear, so sums over micro batches and data-parallel ranks are exact in any layout. Missing losses
    count as zero.

    Args:
        lm_weight: weight of the student's own loss.
        logits_weight: weight of the logits loss.
        hidden_weight: weight of the mean of the intermediate losses.

    Raises:
        ValueError: for a negative weight, or if all are zero.
    """

    def __init__(self, lm_weight: float = 0.0, logits_weight: float = 1.0, hidden_weight: float = 0.0) -> None:
        super().__init__()
        self.knows_weights = True  # before the losses are known
        self.set_weights(lm_weight, logits_weight, hidden_weight)

    def set_weights(self, lm_weight: float, logits_weight: float, hidden_weight: float) -> None:
        """Take these weights from now on.

        Raises:
            ValueError: for a negative weight, or if all are zero.
        """
        weights = {"lm_weight": lm_weight, "logits_weight": logits_weight, "hidden_weight": hidden_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all zero: nothing would be learnt; set one above zero")
        self._weights = (lm_weight, logits_weight, hidden_weight)

    def weights(self) -> tuple[float, float, float]:
        """Return the weights of student, logits and mean intermediate loss."""
        return self._weights

    def forward(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """Return the scalar to differentiate from scalars by name.

        Raises:
            ValueError: for a loss that is not a scalar.
        """
        return _weighted_sum(self._weights, split_losses(self, loss_dict))


def split_losses(balancer: DistillationLossBalancer, loss_dict: dict[str, Tensor]) -> ThreeLosses:
    """Return (student loss, sum of logits losses, mean of intermediate losses), each None if missing."""
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


def _weighted_sum(weights: Any, losses: ThreeLosses) -> Tensor:
    pairs = zip(weights, losses, strict=True)
    return _sum(*(None if weight is None or loss is None else weight * loss for weight, loss in pairs))


def _sum(*terms: Tensor | None) -> Tensor:
    present = [term for term in terms if term is not None]
    return torch.stack(present).sum() if present else torch.zeros(())

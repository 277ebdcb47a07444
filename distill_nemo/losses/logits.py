"""The loss on logits, in the form that ModelOpt's distillation mode calls."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from distill_nemo.losses.divergences import DIVERGENCES


class LogitsKLLoss(_Loss):
    """A divergence between teacher and student next-token distributions, per token.

    Args:
        divergence: a key of `DIVERGENCES`.
        temperature: T, divides both sides' logits.
        scale_by_temperature_squared: multiply by T^2, so that the gradient's size does not fall with T
            (Hinton et al. 2015, section 2).
        true_vocab_size: columns from here on are padding and take no probability; None: no padding.
        group: tensor-parallel group; None where the vocabulary is whole.
        vocab_start: global index of this rank's first column.
    """

    def __init__(
        self,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = True,
        true_vocab_size: int | None = None,
        group: Any = None,
        vocab_start: int = 0,
    ) -> None:
        super().__init__()
        self.divergence, self.temperature, self.group = divergence, temperature, group
        self.factor = temperature**2 if scale_by_temperature_squared else 1.0
        self.true_vocab_size, self.vocab_start = true_vocab_size, vocab_start

    def forward(self, student_logits_SBv: Any, teacher_logits_SBv: Any) -> Tensor:
        """Loss of each token [B, S], fp32. Takes tensors or Megatron's (logits, bias) pairs."""
        student, teacher = self.prepare(student_logits_SBv, teacher_logits_SBv)
        loss_SB = DIVERGENCES[self.divergence](student, teacher, self.temperature, self.group)
        return loss_SB.transpose(0, 1) * self.factor

    def prepare(self, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
        """Both logits with padded columns at -inf and of one width.

        Raises:
            ValueError: when the shards differ in width and the vocabulary is split.
        """
        student, teacher = (x[0] if isinstance(x, tuple) else x for x in (student, teacher))
        split = self.group is not None and self.group.size() > 1
        if student.shape[-1] != teacher.shape[-1]:
            if split or self.true_vocab_size is None:
                raise ValueError(
                    f"vocabulary shards differ: student {student.shape[-1]} columns, teacher {teacher.shape[-1]}"
                )
            return student[..., : self.true_vocab_size], teacher[..., : self.true_vocab_size]
        return self._mask(student), self._mask(teacher)

    def _mask(self, logits_SBv: Tensor) -> Tensor:
        width = logits_SBv.shape[-1]
        if self.true_vocab_size is None or self.vocab_start + width <= self.true_vocab_size:
            return logits_SBv
        columns = torch.arange(self.vocab_start, self.vocab_start + width, device=logits_SBv.device)
        return logits_SBv.masked_fill(columns >= self.true_vocab_size, -torch.inf)

"""The loss between student and teacher logits. Legend: S sequence, B batch, v this rank's vocabulary shard."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.loss import _Loss

from distill_nemo.losses.divergences import choose_divergence

Output = Tensor | tuple[Tensor, Tensor | None]  # Megatron's ColumnParallelLinear returns (logits, bias)


class LogitsKLLoss(_Loss):
    """A divergence per token, times T^2 so that gradients keep their size when the temperature changes.

    T^2 is Hinton et al., "Distilling the Knowledge in a Neural Network", section 2: gradients shrink as 1/T^2.

    Args:
        divergence: a name in `divergences.DIVERGENCES`.
        temperature: T > 0, divides the logits of both sides.
        scale_by_temperature_squared: multiply by T^2, once.
        true_vocab_size: columns from here on (global index) are padding: no probability, gradient exactly 0.
        group: the ranks that share the vocabulary; None: v is the whole vocabulary.
        vocab_start: global index of this rank's first column.
        beta: with jensen_shannon, the teacher's share of the mixture, 0 < beta < 1; other divergences ignore it.
        top_k: with forward_kl, the number of the teacher's most likely tokens to match one by one, with one bucket for
            the rest; None: the whole vocabulary.

    Raises:
        ValueError: for an unknown divergence, a temperature that is not positive, or a beta or top_k that does not fit.
    """

    def __init__(
        self,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = True,
        true_vocab_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        vocab_start: int = 0,
        *,
        beta: float = 0.5,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.divergence = choose_divergence(divergence, temperature, beta, top_k)
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.true_vocab_size = true_vocab_size
        self.group = group
        self.vocab_start = vocab_start

    def set_temperature(self, temperature: float) -> None:
        """Divide the logits of both sides by another temperature from now on."""
        self.divergence = replace(self.divergence, temperature=temperature)

    def forward(self, student_logits_SBv: Output, teacher_logits_SBv: Output) -> Tensor:
        """Return the loss of every token: [S, B, v] twice, any float dtype -> [B, S] fp32, as Megatron's LM loss.

        Raises:
            ValueError: if the vocabularies differ beyond padding; see `prepare`.
        """
        pair = self.prepare(student_logits_SBv, teacher_logits_SBv)
        loss_SB = self.divergence(*pair, self.group)
        return (loss_SB * self.divergence.factor(self.scale_by_temperature_squared)).transpose(0, 1).contiguous()

    def prepare(self, student_logits_SBv: Output, teacher_logits_SBv: Output) -> tuple[Tensor, Tensor]:
        """Return both logits on the same columns, with no probability for padding. The teacher's are detached.

        On one rank padding is cut off; on several it becomes -inf, so that every shard keeps its width.

        Raises:
            ValueError: if the tokens differ, or if widths differ and the true vocabulary is unknown, larger, or
                sharded over ranks.
        """
        student = student_logits_SBv[0] if isinstance(student_logits_SBv, tuple) else student_logits_SBv
        teacher = teacher_logits_SBv[0] if isinstance(teacher_logits_SBv, tuple) else teacher_logits_SBv
        teacher = teacher.detach()
        sharded = self.group is not None and dist.get_world_size(self.group) > 1
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(
                f"student logits are {list(student.shape)}, teacher logits {list(teacher.shape)}: tokens differ"
            )
        self._check(student.shape[-1], teacher.shape[-1], sharded)
        if self.true_vocab_size is None:
            return student, teacher
        num_true = self.true_vocab_size - self.vocab_start
        if num_true >= max(student.shape[-1], teacher.shape[-1]):
            return student, teacher  # a slice of everything would cost a copy of the gradient
        if not sharded:
            return student[..., :num_true], teacher[..., :num_true]
        padding_v = torch.arange(student.shape[-1], device=student.device) >= num_true
        return student.masked_fill(padding_v, -torch.inf), teacher.masked_fill(padding_v, -torch.inf)

    def _check(self, student_width: int, teacher_width: int, sharded: bool) -> None:
        widths = f"student logits have {student_width} columns, teacher logits {teacher_width}"
        if student_width != teacher_width and sharded:
            raise ValueError(f"{widths} on this rank: shards would not line up; pad both vocabularies to the same size")
        if student_width != teacher_width and self.true_vocab_size is None:
            raise ValueError(f"{widths}: set true_vocab_size to the tokenizer's size if they differ in padding only")
        true_size = self.true_vocab_size or 0
        if not sharded and min(student_width, teacher_width) < true_size - self.vocab_start:
            raise ValueError(
                f"{widths}, but the true vocabulary has {true_size}: student and teacher must share a tokenizer"
            )

"""What losses of vocabulary-sharded logits are made of; all collectives of the losses live here.

What a rank computes by itself is in `eager.py`, and as kernels beside it; `local.py` chooses. Forward KL is here as the
pattern of the others, each in a file of its own: `reverse_kl`, `jensen_shannon`, `top_k`.

Legend: S sequence (s: this rank's slice of it), B batch, v this rank's vocabulary shard, R ranks of the group.
With temperature T: q = softmax(student / T), p = softmax(teacher / T) over the whole vocabulary. A log-sum-exp is two
numbers, peak and total, see `eager.py`; a and b are student and teacher logits less their peaks, divided by T.
`group=None` means that v is the whole vocabulary: no collective. Everything is fp32 inside, whatever comes in.
Padded columns hold -inf on both sides and count for nothing, even where they fill a rank's shard.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_nemo.losses.eager import below, chunks, total_and_mean, weigh
from distill_nemo.losses.local import gradient_buffer, implementation

# What one rank does for a divergence: it yields what to gather, is sent [R, ...], and returns the loss of every token
# and the numbers that its gradient needs, the student's log-sum-exp first. `gathered` runs it for logits that are
# given; `fused_linear.py` computes other tokens while the collective is under way.
Steps = Generator[Tensor, Tensor, tuple[Tensor, tuple[Tensor, ...]]]


def vocab_parallel_forward_kl(
    student_logits_SBv: Tensor,
    teacher_logits_SBv: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    *,
    overwrite_student_logits: bool = False,
) -> Tensor:
    """KL(teacher || student) of every token.

    Without shards, `log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)` of student z and teacher t:
    `F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)`.
    As computed, with P and Q the totals of teacher and student: `kl = E_p[b - a] - log P + log Q`, where no number has
    an offset common to all logits in it. Peaks, totals and means of the shards make those of the vocabulary.

    The gradient is `(q - p) / T` for the student, in its dtype, and none for the teacher. T^2 is left to the caller.
    Collectives: one all-gather of both peaks and totals and the mean, 20 bytes per token and rank, in forward; none in
    backward. Saved for backward: the inputs and four fp32 numbers per token.

    Args:
        student_logits_SBv: [S, B, v], any float dtype.
        teacher_logits_SBv: the same shape; left unchanged.
        temperature: T > 0.
        group: the ranks that share the vocabulary.
        overwrite_student_logits: let backward put the gradient where the student's logits were, if they are contiguous.
            Nothing may read them afterwards; an autograd function that saved them raises. Else they are unchanged.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    args = student_logits_SBv, teacher_logits_SBv, temperature, group, overwrite_student_logits
    return _ForwardKL.apply(*args)  # pyright: ignore


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_SBv: Tensor,
        teacher_SBv: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        overwrite: bool,
    ) -> Tensor:
        loss_SB, numbers_SB = gathered(forward_kl_steps(student_SBv, teacher_SBv, temperature), group)
        ctx.save_for_backward(student_SBv, teacher_SBv, *numbers_SB)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        return loss_SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None, None]:
        student_SBv, teacher_SBv, *numbers = ctx.saved_tensors
        out_SBv = gradient_buffer(student_SBv, ctx.overwrite)
        pair = student_SBv, teacher_SBv
        implementation(*pair).forward_kl_gradient(*pair, *numbers, grad_SB, ctx.temperature, out_SBv)
        return out_SBv, None, None, None, None


@torch.no_grad()
def vocab_parallel_top1_agreement(
    student_logits_SBv: Tensor, teacher_logits_SBv: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """1.0 where student and teacher have the same most likely token (lowest index on ties), else 0.0.

    Without shards: `(z.argmax(-1) == t.argmax(-1)).float()`. Collectives: one all-gather. No gradient.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    best = [x.argmax(-1, keepdim=True) for x in (student_logits_SBv, teacher_logits_SBv)]
    values = [x.gather(-1, i) for x, i in zip((student_logits_SBv, teacher_logits_SBv), best, strict=True)]
    # fp32 holds a column index exactly up to 2^24.
    top_R4SB = gather(torch.stack([x.squeeze(-1).float() for x in (*values, *best)]), group)
    rank_2SB = top_R4SB[:, :2].argmax(0)  # the first, so the lowest, rank on ties
    column_2SB = top_R4SB[:, 2:].gather(0, rank_2SB[None])[0]
    same = (rank_2SB[0] == rank_2SB[1]) & (column_2SB[0] == column_2SB[1])
    return same.float()


@torch.no_grad()
def vocab_parallel_entropy(logits_SBv: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy in nats of the softmax of every token; `Categorical(logits=z).entropy()` without shards.

    Collectives: one all-gather. No gradient.

    Returns:
        [S, B] fp32, the same on every rank.
    """
    stats = []
    for _, (x,) in chunks(logits_SBv):
        peak = x.amax(-1)
        x = below(x, peak, 1.0)
        stats.append(torch.stack([peak, *total_and_mean(x, x)]))
    stats_R3SB = gather(torch.cat(stats, dim=1).unflatten(1, logits_SBv.shape[:-1]), group)
    (peak_SB, total_SB), share_RSB = merge(stats_R3SB[:, :2], 1.0)
    mean_SB = weigh(share_RSB, stats_R3SB[:, 2] + (stats_R3SB[:, 0] - peak_SB)).sum(0)
    return total_SB.log() - mean_SB


def gather_sequence(loss_sB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put the slices of a sequence-parallel loss together: [s, B] on each rank -> [S, B] on all.

    The gradient is this rank's slice, not summed over ranks: exact when every rank goes on to compute the same total
    loss (Megatron's `gather_from_sequence_parallel_region(tensor_parallel_output_grad=False)`).
    Collectives: one all-gather in forward; none in backward.
    """
    return _GatherSequence.apply(loss_sB, group)  # pyright: ignore


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sB: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.start, ctx.length = dist.get_rank(group) * loss_sB.shape[0], loss_sB.shape[0]
        return gather(loss_sB, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None]:
        return grad_SB.narrow(0, ctx.start, ctx.length), None


def forward_kl_steps(student_SBv: Tensor, teacher_SBv: Tensor, temperature: float) -> Steps:
    """One gather; numbers: the log-sum-exps of student and teacher."""
    kl_SB, teacher_lse_2SB, student_lse_2SB, _ = yield from kl_steps(teacher_SBv, student_SBv, temperature)
    return kl_SB, (student_lse_2SB, teacher_lse_2SB)


def kl_steps(
    p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """KL(p || q), the log-sum-exps of p and q, and the mean that `eager.kl_statistics` defines, of the vocabulary.

    One gather of the shards' five numbers, 20 bytes per token and rank.
    """
    pair = p_logits_SBv, q_logits_SBv
    stats_R5SB = yield implementation(*pair).kl_statistics(*pair, temperature)
    p_lse_2SB, share_RSB = merge(stats_R5SB[:, :2], temperature)
    q_lse_2SB, _ = merge(stats_R5SB[:, 2:4], temperature)
    lower_RSB = (stats_R5SB[:, 0] - p_lse_2SB[0]) - (stats_R5SB[:, 2] - q_lse_2SB[0])  # of the shards' peaks
    mean_SB = weigh(share_RSB, stats_R5SB[:, 4] + lower_RSB / temperature).sum(0)
    return mean_SB - p_lse_2SB[1].log() + q_lse_2SB[1].log(), p_lse_2SB, q_lse_2SB, mean_SB


def gathered(steps: Steps, group: dist.ProcessGroup | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `steps` to their end, one all-gather for each time they ask."""
    local = next(steps)
    while True:
        try:
            local = steps.send(gather(local, group))
        except StopIteration as end:
            return end.value


def merge(lse_R2SB: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Shards' log-sum-exps to that of the whole vocabulary, [2, S, B], and each shard's share of it, [R, S, B]."""
    peak_RSB, total_RSB = lse_R2SB.unbind(1)
    peak_SB = peak_RSB.amax(0)
    total_RSB = total_RSB * ((peak_RSB - peak_SB) / temperature).exp()
    total_SB = total_RSB.sum(0)
    return torch.stack([peak_SB, total_SB]), total_RSB / total_SB


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] on each rank -> [R, ...] on all."""
    if group is None or dist.get_world_size(group) == 1:
        return x[None]
    num_ranks = dist.get_world_size(group)
    gathered = x.new_empty(num_ranks, *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)  # its one-tensor form has other names in other torches
    return gathered


def start_gather(parts: list[Tensor], group: dist.ProcessGroup | None) -> Callable[[], list[Tensor]]:
    """Begin to gather several at once, in one collective: call what is returned for [R, ...] of each."""
    if group is None or dist.get_world_size(group) == 1:
        return lambda: [x[None] for x in parts]
    flat = torch.cat([x.flatten() for x in parts])
    num_ranks = dist.get_world_size(group)
    everyone = flat.new_empty(num_ranks, len(flat))
    work: Any = dist.all_gather(list(everyone), flat, group=group, async_op=True)

    def wait() -> list[Tensor]:
        work.wait()
        pieces = everyone.split([x.numel() for x in parts], dim=1)
        return [piece.unflatten(1, x.shape) for piece, x in zip(pieces, parts, strict=True)]

    return wait

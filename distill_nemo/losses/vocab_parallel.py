"""The only file of losses with collectives: divergences over vocabulary shards, in two local passes and one gather.

Legend: S sequence, B batch, v this rank's vocabulary shard, V the whole vocabulary, R ranks of the group.
a = student / T and b = teacher / T are logits, q and p their softmax over V. Per rank r with local log-sum-exps
ls = LSE_v(a), lt = LSE_v(b) and c = sum_v e^(b - lt) (b - a):
KL(p || q) = sum_r e^(lt_r - Lt) c_r - Lt + Ls with L = LSE_r(l_r), so one all-gather of (lt, ls, c) is enough.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def vocab_parallel_forward_kl(
    student_logits_SBv: Tensor, teacher_logits_SBv: Tensor, temperature: float = 1.0, group: Group = None
) -> Tensor:
    """KL(teacher || student) of each token, in nats, exact over the whole vocabulary.

    As `F.kl_div((z / T).log_softmax(-1), (t / T).log_softmax(-1), log_target=True, reduction="none").sum(-1)` of the
    gathered logits, without the factor T^2. One all-gather of 12 bytes per token forward, no collective backward.
    Columns of -inf on both sides take no part.

    Args:
        student_logits_SBv: any float dtype; gets the gradient (q - p) / T in its own dtype.
        teacher_logits_SBv: same shape; gets none.
        temperature: T, divides both.
        group: tensor-parallel group over which the vocabulary is split; None where it is whole.

    Returns:
        [S, B], fp32.
    """
    return _ForwardKL.apply(student_logits_SBv, teacher_logits_SBv, temperature, group)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_SBv, t_SBv, temperature, group):  # noqa: ANN001, ANN205
        a_SBv, b_SBv = z_SBv.float() / temperature, t_SBv.float() / temperature
        ls, lt = a_SBv.logsumexp(-1), b_SBv.logsumexp(-1)
        shifted = b_SBv - lt.nan_to_num(neginf=0.0)[..., None]
        difference = torch.where(torch.isneginf(b_SBv), 0.0, b_SBv - a_SBv)
        c = (shifted.exp() * difference).sum(-1)
        lt_R, ls_R, c_R = gather_stats(torch.stack([lt, ls, c]), group)
        Lt, Ls = lt_R.logsumexp(0), ls_R.logsumexp(0)
        ctx.save_for_backward(z_SBv, t_SBv, Ls, Lt)
        ctx.temperature = temperature
        return ((lt_R - Lt).exp() * c_R).sum(0) - Lt + Ls

    @staticmethod
    def backward(ctx, grad_SB):  # noqa: ANN001, ANN205
        z_SBv, t_SBv, Ls, Lt = ctx.saved_tensors
        T = ctx.temperature
        q = (z_SBv.float() / T - Ls[..., None]).exp()
        grad = q.sub_((t_SBv.float() / T - Lt[..., None]).exp()).mul_(grad_SB[..., None] / T)
        return grad.to(z_SBv.dtype), None, None, None


def gather_stats(stats_KSB: Tensor, group: Group) -> Tensor:
    """[K, S, B] of every rank -> [K, R, S, B]: the one collective of a divergence's forward."""
    if group is None or group.size() == 1:
        return stats_KSB[:, None]
    gathered = stats_KSB.new_empty((group.size(), *stats_KSB.shape))
    dist.all_gather_into_tensor(gathered, stats_KSB.contiguous(), group=group)
    return gathered.transpose(0, 1)


@torch.no_grad()
def vocab_parallel_top1_agreement(student_SBv: Tensor, teacher_SBv: Tensor, group: Group = None) -> Tensor:
    """[S, B] of 1.0 where both have the same most likely token, else 0.0; of equal logits the lowest index counts."""
    student_SB, teacher_SB = (_argmax(x, group) for x in (student_SBv, teacher_SBv))
    return (student_SB == teacher_SB).float()


def _argmax(logits_SBv: Tensor, group: Group) -> Tensor:
    values, index = logits_SBv.float().max(-1)
    if group is None or group.size() == 1:
        return index
    values_RSB = gather_stats(values[None], group)[0]
    index_RSB = gather_stats(index[None] + group.rank() * logits_SBv.shape[-1], group)[0]
    return index_RSB.gather(0, values_RSB.argmax(0, keepdim=True))[0]


@torch.no_grad()
def vocab_parallel_entropy(logits_SBv: Tensor, group: Group = None) -> Tensor:
    """Entropy of each token's distribution, [S, B], in nats, fp32: L - sum_V p logit."""
    x = logits_SBv.float()
    lse = x.logsumexp(-1)
    weighted = ((x - lse[..., None]).exp() * torch.where(torch.isneginf(x), 0.0, x)).sum(-1)
    lse_R, weighted_R = gather_stats(torch.stack([lse, weighted]), group)
    L = lse_R.logsumexp(0)
    return L - ((lse_R - L).exp() * weighted_R).sum(0)


def gather_sequence(values_SB: Tensor, group: Group) -> Tensor:
    """This rank's slice of the sequence -> the whole sequence, for losses under sequence parallelism.

    Every tensor-parallel rank then computes the same total loss, so each takes back its own slice of the gradient;
    summing over ranks would multiply it by their number.
    """
    return _GatherSequence.apply(values_SB, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_SB, group):  # noqa: ANN001, ANN205
        ctx.group, ctx.length = group, values_SB.shape[0]
        whole = values_SB.new_empty((values_SB.shape[0] * group.size(), *values_SB.shape[1:]))
        dist.all_gather_into_tensor(whole, values_SB.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        start = ctx.group.rank() * ctx.length
        return grad[start : start + ctx.length].contiguous(), None

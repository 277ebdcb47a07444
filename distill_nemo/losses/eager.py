"""What one rank computes of its vocabulary shard, in plain torch: the reference for the kernels, and their substitute.

`cpu_kernels.py` and `triton_kernels.py` have functions of the same names, arguments and results; `local.py` chooses.

Legend: S, B, v as in `vocab_parallel.py`, N = S B tokens. Temperature T: a = student/T, b = teacher/T, q = softmax(a),
p = softmax(b) over the whole vocabulary. Logits are [S, B, v] of any float dtype, numbers per token [S, B] fp32. No
collectives. Gradients are written into `out` (which may be the student's logits: each row is read before it is
written), in its dtype; they are exactly 0 for tokens whose `grad` is 0, even where their logits are NaN.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Whether gradients take a last argument `lm`, a `CrossEntropy` or None, whose gradient they add before they round, and
# an `out` of another dtype than fp32 logits. Then it must not be the student's logits. Triton's do.
ONE_PASS = False
# Elements worked on at once. On CPU a few such fp32 buffers stay in a core's cache; on CUDA fewer launches win.
CHUNK = 2**17
CUDA_CHUNK = 2**22


def chunks(temperature: float, *logits_SBv: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Successive tokens of each, as fp32 copies [n, v] divided by the temperature, free to be overwritten; and which.

    The copies are only valid until the next are asked for.
    """
    logits_Nv = [x.flatten(0, -2) for x in logits_SBv]
    num_tokens, width = logits_Nv[0].shape
    step = max(1, (CUDA_CHUNK if logits_Nv[0].is_cuda else CHUNK) // max(1, width))
    buffers = [x.new_empty(min(step, num_tokens), width, dtype=torch.float32) for x in logits_Nv]
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        parts = tuple(buffer[: rows.stop - start].copy_(x[rows]) for buffer, x in zip(buffers, logits_Nv, strict=True))
        yield rows, parts if temperature == 1 else tuple(x.div_(temperature) for x in parts)


def lse_and_mean(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the shard, and the mean of `values` under its softmax, where weight 0 counts for nothing."""
    peak = logits.amax(-1)
    # A shard of nothing but -inf would give -inf - -inf; its weights are 0 whatever is subtracted, and so is its mean.
    weights = (logits - peak.masked_fill(peak == -torch.inf, 0.0).unsqueeze(-1)).exp_()
    total = weights.sum(-1).clamp(min=1.0)
    # Divided by the sum of these very weights: subtracting a rounded log-sum-exp instead costs a digit.
    return peak + total.log(), weigh(weights, values).sum(-1) / total


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`weights * values`, where weight 0 counts for nothing: padding has inf - inf, so nan, for a value."""
    return torch.where(weights == 0, 0.0, weights * values)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """`(lse(x), E_softmax(x)[x - y], lse(y))` over the shard, x and y the logits / T: [3, S, B]."""
    stats = []
    for _, (x, y) in chunks(temperature, p_logits_SBv, q_logits_SBv):
        y_lse = y.logsumexp(-1)
        stats.append(torch.stack([*lse_and_mean(x, torch.sub(x, y, out=y)), y_lse]))
    return torch.cat(stats, dim=1).unflatten(1, p_logits_SBv.shape[:-1])


def forward_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    teacher_lse_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
) -> None:
    """`grad (q - p) / T`."""
    student_lse_N, teacher_lse_N = student_lse_SB.flatten(), teacher_lse_SB.flatten()
    for rows, (a, b) in chunks(temperature, student_SBv, teacher_SBv):
        q = a.sub_(student_lse_N[rows, None]).exp_()
        p = b.sub_(teacher_lse_N[rows, None]).exp_()
        write_gradient(out_SBv, rows, q.sub_(p), grad_SB, 1 / temperature)


def reverse_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    mean_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
) -> None:
    """`grad q (a - b - mean) / T`, mean being E_q[a - b]."""
    student_lse_N, mean_N = student_lse_SB.flatten(), mean_SB.flatten()
    for rows, (a, b) in chunks(temperature, student_SBv, teacher_SBv):
        surplus = torch.sub(a, b, out=b).sub_(mean_N[rows, None])
        q = a.sub_(student_lse_N[rows, None]).exp_()
        slope = surplus.mul_(q).masked_fill_(q == 0, 0.0)  # padding: 0 * nan
        write_gradient(out_SBv, rows, slope, grad_SB, 1 / temperature)


def jensen_shannon_kls(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    teacher_lse_SB: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """The shard's part of KL(p || m) and KL(q || m), m = beta p + (1 - beta) q: [2, S, B]."""
    student_lse_N, teacher_lse_N, kls = student_lse_SB.flatten(), teacher_lse_SB.flatten(), []
    for rows, (a, b) in chunks(temperature, student_SBv, teacher_SBv):
        log_q, log_p = a.sub_(student_lse_N[rows, None]), b.sub_(teacher_lse_N[rows, None])
        ratios = _log_ratios(log_p - log_q, beta)
        kls.append(torch.stack([weigh(x.exp(), r).sum(-1) for x, r in zip((log_p, log_q), ratios, strict=True)]))
    return torch.cat(kls, dim=1).unflatten(1, student_SBv.shape[:-1])


def jensen_shannon_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    teacher_lse_SB: Tensor,
    student_kl_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    beta: float,
    out_SBv: Tensor,
) -> None:
    """`grad (1 - beta) q (log(q / m) - KL(q || m)) / T`."""
    student_lse_N, teacher_lse_N, student_kl_N = (x.flatten() for x in (student_lse_SB, teacher_lse_SB, student_kl_SB))
    for rows, (a, b) in chunks(temperature, student_SBv, teacher_SBv):
        log_q, log_p = a.sub_(student_lse_N[rows, None]), b.sub_(teacher_lse_N[rows, None])
        _, log_q_m = _log_ratios(log_p - log_q, beta)
        slope = weigh(log_q.exp_(), log_q_m.sub_(student_kl_N[rows, None]))
        write_gradient(out_SBv, rows, slope, grad_SB, (1 - beta) / temperature)


def write_gradient(out_SBv: Tensor, rows: slice, slope_nv: Tensor, grad_SB: Tensor, factor: float) -> None:
    """`out[rows] = slope grad factor`, and 0 where grad is 0, whatever the slope. Overwrites `slope_nv`."""
    grad_n1 = grad_SB.flatten()[rows, None]
    slope_nv.mul_(grad_n1 * factor).masked_fill_(grad_n1 == 0, 0.0)
    out_SBv.flatten(0, -2)[rows] = slope_nv


def _log_ratios(log_p_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) from log(p / q).

    `log(q / m) = -log(1 - beta + beta p / q)` where p <= q, and `log(p / m) = -log(beta + (1 - beta) q / p)` elsewhere,
    the other of the two being log(p / q) away. So nothing overflows, and p = q gives 0 exactly.
    """
    share = torch.full_like(log_p_q, beta).masked_fill_(log_p_q > 0, 1 - beta)
    larger = share.mul_(log_p_q.abs().neg_().expm1_()).log1p_().neg_()
    return larger + log_p_q.clamp(max=0), larger - log_p_q.clamp(min=0)

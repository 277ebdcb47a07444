"""What one rank computes of its vocabulary shard, in plain torch: the reference for the kernels, and their substitute.

`cpu_kernels.py` and `triton_kernels.py` have functions of the same names, arguments and results; `local.py` chooses.

Legend: S, B, v as in `vocab_parallel.py`, N = S B tokens. Temperature T: a = student/T, b = teacher/T, q = softmax(a),
p = softmax(b) over the whole vocabulary. Logits are [S, B, v] of any float dtype, numbers per token [S, B] fp32. No
collectives. Gradients are written into `out` (which may be the student's logits: each row is read before it is
written), in its dtype; they are exactly 0 for tokens whose `grad` is 0, even where their logits are NaN.

A log-sum-exp of logits x is two numbers, `lse_2SB`: the peak, their largest, and the total, sum exp((x - peak) / T). So
softmax(x / T) = exp((x - peak) / T) / total. Their sum `peak / T + log(total)` in one fp32 number would lose digits of
the total to an offset common to all logits; so peaks are subtracted first, and only then is divided by T.
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


def chunks(*logits_SBv: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Successive tokens of each, as fp32 copies [n, v], free to be overwritten; and which.

    The copies are only valid until the next are asked for.
    """
    logits_Nv = [x.flatten(0, -2) for x in logits_SBv]
    num_tokens, width = logits_Nv[0].shape
    step = max(1, (CUDA_CHUNK if logits_Nv[0].is_cuda else CHUNK) // max(1, width))
    buffers = [x.new_empty(min(step, num_tokens), width, dtype=torch.float32) for x in logits_Nv]
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        pairs = zip(buffers, logits_Nv, strict=True)
        yield rows, tuple(buffer[: rows.stop - start].copy_(x[rows]) for buffer, x in pairs)


def below(logits_nv: Tensor, peak_n: Tensor, temperature: float) -> Tensor:
    """`(logits - peak) / T`, in place."""
    # A shard of nothing but -inf would give -inf - -inf; its weights are 0 whatever is subtracted.
    logits_nv.sub_(peak_n.masked_fill(peak_n == -torch.inf, 0.0)[..., None])
    return logits_nv if temperature == 1 else logits_nv.div_(temperature)


def softmax(logits_nv: Tensor, lse_2n: Tensor, temperature: float) -> Tensor:
    """`softmax(logits / T)`, in place."""
    peak_n, total_n = lse_2n
    return below(logits_nv, peak_n, temperature).exp_().div_(total_n[:, None])


def total_and_mean(below_nv: Tensor, values_nv: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the weights `exp(below)`, and the mean of `values` under them, where weight 0 counts for nothing."""
    weights = below_nv.exp()
    total = weights.sum(-1)
    return total, weigh(weights, values_nv).sum(-1) / total.clamp(min=1.0)  # 0 in a shard of nothing but -inf


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`weights * values`, where weight 0 counts for nothing: padding has inf - inf, so nan, for a value."""
    return torch.where(weights == 0, 0.0, weights * values)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """Of logits x and y over the shard `(x_peak, x_total, y_peak, y_total, mean)`: [5, S, B].

    mean is the mean under softmax(x / T) of `(x - x_peak) / T - (y - y_peak) / T`.
    """
    stats = []
    for _, (x, y) in chunks(p_logits_SBv, q_logits_SBv):
        x_peak, y_peak = x.amax(-1), y.amax(-1)
        x, y = below(x, x_peak, temperature), below(y, y_peak, temperature)
        y_total = y.exp().sum(-1)
        x_total, mean = total_and_mean(x, torch.sub(x, y, out=y))
        stats.append(torch.stack([x_peak, x_total, y_peak, y_total, mean]))
    return torch.cat(stats, dim=1).unflatten(1, p_logits_SBv.shape[:-1])


def forward_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
) -> None:
    """`grad (q - p) / T`."""
    student_lse_2N, teacher_lse_2N = student_lse_2SB.flatten(1), teacher_lse_2SB.flatten(1)
    for rows, (z, t) in chunks(student_SBv, teacher_SBv):
        q, p = softmax(z, student_lse_2N[:, rows], temperature), softmax(t, teacher_lse_2N[:, rows], temperature)
        write_gradient(out_SBv, rows, q.sub_(p), grad_SB, 1 / temperature)


def reverse_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_peak_SB: Tensor,
    mean_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
) -> None:
    """`grad q (a - b - mean) / T`; a and b are what is below the peaks, and mean is E_q[a - b]."""
    (peak_N, total_N), teacher_peak_N, mean_N = student_lse_2SB.flatten(1), teacher_peak_SB.flatten(), mean_SB.flatten()
    for rows, (z, t) in chunks(student_SBv, teacher_SBv):
        a, b = below(z, peak_N[rows], temperature), below(t, teacher_peak_N[rows], temperature)
        surplus = torch.sub(a, b, out=b).sub_(mean_N[rows, None])
        weights = a.exp_()
        slope = surplus.mul_(weights).masked_fill_(weights == 0, 0.0)  # padding: 0 * nan
        write_gradient(out_SBv, rows, slope, grad_SB, 1 / (temperature * total_N[rows, None]))


def jensen_shannon_kls(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """The shard's part of KL(p || m) and KL(q || m), m = beta p + (1 - beta) q: [2, S, B]."""
    pair, sums = (student_SBv, teacher_SBv, student_lse_2SB, teacher_lse_2SB), []
    for _, q, p, log_p_q in _weights(*pair, temperature):
        sums.append(torch.stack([weigh(x, r).sum(-1) for x, r in zip((p, q), _log_ratios(log_p_q, beta), strict=True)]))
    totals_2SB = torch.stack([teacher_lse_2SB[1], student_lse_2SB[1]])
    return torch.cat(sums, dim=1).unflatten(1, student_SBv.shape[:-1]) / totals_2SB


def jensen_shannon_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    student_kl_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    beta: float,
    out_SBv: Tensor,
) -> None:
    """`grad (1 - beta) q (log(q / m) - KL(q || m)) / T`."""
    student_kl_N, total_N = student_kl_SB.flatten(), student_lse_2SB[1].flatten()
    for rows, q, _, log_p_q in _weights(student_SBv, teacher_SBv, student_lse_2SB, teacher_lse_2SB, temperature):
        _, log_q_m = _log_ratios(log_p_q, beta)
        slope = weigh(q, log_q_m.sub_(student_kl_N[rows, None]))
        write_gradient(out_SBv, rows, slope, grad_SB, (1 - beta) / (temperature * total_N[rows, None]))


def _weights(
    student_SBv: Tensor, teacher_SBv: Tensor, student_lse_2SB: Tensor, teacher_lse_2SB: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Successive tokens: which, q and p times their totals, and log(p / q); valid until the next are asked for."""
    (q_peak_N, q_total_N), (p_peak_N, p_total_N) = student_lse_2SB.flatten(1), teacher_lse_2SB.flatten(1)
    for rows, (z, t) in chunks(student_SBv, teacher_SBv):
        a, b = below(z, q_peak_N[rows], temperature), below(t, p_peak_N[rows], temperature)
        log_p_q = (b - a).add_((q_total_N[rows] / p_total_N[rows]).log_()[:, None])
        yield rows, a.exp_(), b.exp_(), log_p_q


def write_gradient(out_SBv: Tensor, rows: slice, slope_nv: Tensor, grad_SB: Tensor, factor: float | Tensor) -> None:
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

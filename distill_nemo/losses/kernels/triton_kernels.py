"""Kernels in Triton for CUDA; on CPU only through the interpreter (TRITON_INTERPRET=1).

Forward reads every logit once (online log-sum-exp; twice for Jensen-Shannon), with one program per token. Backward
reads once and writes once, with one program per token and block of columns. It skips the logits of a token without a
gradient. With the LM loss's gradient it reads the student's logits again, from the first-level cache. All sums run in
fp32 in one order, without atomics, so results have the same bits in every run.

Memory limits the time only if few instructions are spent on a column: an H200 has about 30 for a column of student and
teacher in bf16. So logits are multiplied by 1/T, never divided; exponentials are the hardware's, of base 2; and no
number leaves its thread within a loop. tests/unit/losses/test_kernels.py counts them in the code for sm_90.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_nemo.losses.kernels.eager import LMGradient

# Forward: a thread handles ROWS columns of a lane. Backward: a program handles BLOCK columns of one token.
ROWS, LANES, LANE_WARPS = 4, 1024, 4
BLOCK, WARPS = 4096, 8
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a peak before any column: finite, as -inf - -inf would be NaN


@triton.jit
def _load(logits, columns, width):
    return tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)


@triton.jit
def _exp(x):
    """Compute exp(x), with 0 for results below 1e-38, on which `tl.exp` spends three more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _weigh(weights, values):
    """Multiply by a weight; 0 gives 0 even for an infinite value."""
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def _statistics(
    P, Q, OUT, p_stride, q_stride, num_tokens, width, per_temperature, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Compute `eager.kl_statistics`. Every lane has its own peaks and sums, which are merged at the end."""
    per_unit = per_temperature * LOG2_E
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x_peak, y_peak = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), LOWEST, tl.float32)
    x_sum, y_sum = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    weighed = tl.zeros((LANES,), tl.float32)
    for start in range(0, width, ROWS * LANES):
        x = _load(P + token * p_stride, start + block, width)
        y = _load(Q + token * q_stride, start + block, width)
        x_new, y_new = tl.maximum(x_peak, tl.max(x, 0)), tl.maximum(y_peak, tl.max(y, 0))
        x_raised, y_raised = x_new - x_peak, y_new - y_peak
        x_scale = tl.exp2(-x_raised * per_unit)
        x, y = x - x_new[None, :], y - y_new[None, :]
        weights = tl.exp2(x * per_unit)
        weighed = _weigh(x_scale, weighed + x_sum * (y_raised - x_raised)) + tl.sum(_weigh(weights, x - y), 0)
        x_sum = x_sum * x_scale + tl.sum(weights, 0)
        y_sum = y_sum * tl.exp2(-y_raised * per_unit) + tl.sum(tl.exp2(y * per_unit), 0)
        x_peak, y_peak = x_new, y_new
    x_top, y_top = tl.max(x_peak, 0), tl.max(y_peak, 0)
    x_raised, y_raised = x_top - x_peak, y_top - y_peak
    x_scale = tl.exp2(-x_raised * per_unit)
    x_total, y_total = tl.sum(x_sum * x_scale, 0), tl.sum(y_sum * tl.exp2(-y_raised * per_unit), 0)
    mean = tl.sum(_weigh(x_scale, weighed + x_sum * (y_raised - x_raised)), 0) * per_temperature / x_total
    tl.store(OUT + token, tl.where(x_total == 0, -float("inf"), x_top))
    tl.store(OUT + num_tokens + token, x_total)
    tl.store(OUT + 2 * num_tokens + token, tl.where(y_total == 0, -float("inf"), y_top))
    tl.store(OUT + 3 * num_tokens + token, y_total)
    tl.store(OUT + 4 * num_tokens + token, tl.where(x_total == 0, 0.0, mean))


@triton.jit
def _log_ratios(log_p_q, beta):
    """Compute `_log_ratios` of divergences/jensen_shannon.py with exp(-|x|) - 1 in place of expm1."""
    share = tl.where(log_p_q > 0, 1 - beta, beta)
    larger = -tl.log(1 + share * (_exp(-tl.abs(log_p_q)) - 1))
    return larger + tl.minimum(log_p_q, 0.0), larger - tl.maximum(log_p_q, 0.0)


@triton.jit
def _jensen_shannon_kls(
    Z, T, Z_LSE, T_LSE, OUT, z_stride, t_stride, num_tokens, width, per_temperature, beta, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    z_peak, t_peak = tl.load(Z_LSE + token), tl.load(T_LSE + token)
    z_total, t_total = tl.load(Z_LSE + num_tokens + token), tl.load(T_LSE + num_tokens + token)
    per_unit, log_totals = per_temperature * LOG2_E, tl.log(z_total / t_total)
    p_m, q_m = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(Z + token * z_stride, columns, width) - z_peak
        t = _load(T + token * t_stride, columns, width) - t_peak
        log_p_m, log_q_m = _log_ratios((t - z) * per_temperature + log_totals, beta)
        p_m += _weigh(tl.exp2(t * per_unit), log_p_m)
        q_m += _weigh(tl.exp2(z * per_unit), log_q_m)
    tl.store(OUT + token, tl.sum(p_m, 0) / t_total)
    tl.store(OUT + num_tokens + token, tl.sum(q_m, 0) / z_total)


@triton.jit
def _gradient(
    Z, T, NUMBERS, COLUMN, OUT, z_stride, t_stride, width, per_temperature, beta,
    DIVERGENCE: tl.constexpr, LM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of BLOCK columns of a token. `_launch_gradient` defines a token's eight NUMBERS."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = NUMBERS + token * 8
    scale, per_unit = tl.load(numbers + 1), per_temperature * LOG2_E
    slope = tl.zeros((BLOCK,), tl.float32)
    if scale != 0:
        other = tl.load(numbers + 3)
        z = _load(Z + token * z_stride, columns, width) - tl.load(numbers)
        t = _load(T + token * t_stride, columns, width) - tl.load(numbers + 2)
        weights = tl.exp2(z * per_unit)
        if DIVERGENCE == "forward_kl":
            slope = weights * scale - tl.exp2(t * per_unit) * other
        elif DIVERGENCE == "reverse_kl":
            slope = _weigh(weights, (z - t) * (per_temperature * scale) - other * scale)
        else:
            scale *= 1 - beta
            _, log_q_m = _log_ratios((t - z) * per_temperature + other, beta)
            slope = _weigh(weights, log_q_m * scale - tl.load(numbers + 4) * scale)
    if LM:
        lm_grad = tl.load(numbers + 7)
        if lm_grad != 0:
            z = _load(Z + token * z_stride, columns, width) - tl.load(numbers + 5)
            hit = columns == tl.load(COLUMN + token)
            slope += _exp(z) * tl.load(numbers + 6) - tl.where(hit, lm_grad, 0.0)
    tl.store(OUT + token * width + columns, slope.to(OUT.dtype.element_ty), mask=columns < width)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """Replace `eager.kl_statistics`."""
    p_Nv, q_Nv = _rows(p_logits_SBv), _rows(q_logits_SBv)
    out = p_Nv.new_empty(5, *p_logits_SBv.shape[:-1], dtype=torch.float32)
    num_tokens, width = p_Nv.shape
    sizes = p_Nv.stride(0), q_Nv.stride(0), num_tokens, width, 1 / temperature
    lanes = _block(width, LANES)
    shape = {"ROWS": _block(width, ROWS * LANES) // lanes, "LANES": lanes}
    _statistics[(num_tokens,)](p_Nv, q_Nv, out, *sizes, **shape, num_warps=LANE_WARPS)  # pyright: ignore
    return out


def forward_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    grad_SB: Tensor,
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
) -> Tensor:
    """Replace `Divergence.gradient` of `ForwardKL`."""
    z_scale_SB, t_scale_SB = (_scale(grad_SB, x, temperature) for x in (student_lse_2SB, teacher_lse_2SB))
    numbers = student_lse_2SB[0], z_scale_SB, teacher_lse_2SB[0], t_scale_SB, t_scale_SB
    return _launch_gradient("forward_kl", student_SBv, teacher_SBv, numbers, temperature, 0.0, out_SBv, lm)


def reverse_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_peak_SB: Tensor,
    mean_SB: Tensor,
    grad_SB: Tensor,
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
) -> Tensor:
    """Replace `Divergence.gradient` of `ReverseKL`."""
    z_scale_SB = _scale(grad_SB, student_lse_2SB, temperature)
    numbers = student_lse_2SB[0], z_scale_SB, teacher_peak_SB, mean_SB, mean_SB
    return _launch_gradient("reverse_kl", student_SBv, teacher_SBv, numbers, temperature, 0.0, out_SBv, lm)


def jensen_shannon_kls(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """Replace `divergences.jensen_shannon.jensen_shannon_kls`."""
    z_Nv, t_Nv = _rows(student_SBv), _rows(teacher_SBv)
    out = z_Nv.new_empty(2, *student_SBv.shape[:-1], dtype=torch.float32)
    num_tokens, width = z_Nv.shape
    sizes = z_Nv.stride(0), t_Nv.stride(0), num_tokens, width, 1 / temperature, float(beta)
    lse = student_lse_2SB.contiguous(), teacher_lse_2SB.contiguous()
    _jensen_shannon_kls[(num_tokens,)](z_Nv, t_Nv, *lse, out, *sizes, BLOCK=_block(width, BLOCK), num_warps=WARPS)  # pyright: ignore
    return out


def jensen_shannon_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_2SB: Tensor,
    teacher_lse_2SB: Tensor,
    student_kl_SB: Tensor,
    grad_SB: Tensor,
    out_SBv: Tensor,
    lm: LMGradient | None,
    temperature: float,
    beta: float,
) -> Tensor:
    """Replace `Divergence.gradient` of `JensenShannon`."""
    (z_peak_SB, z_total_SB), (t_peak_SB, t_total_SB) = student_lse_2SB, teacher_lse_2SB
    log_totals_SB = (z_total_SB / t_total_SB).log()
    z_scale_SB = _scale(grad_SB, student_lse_2SB, temperature)
    numbers = z_peak_SB, z_scale_SB, t_peak_SB, log_totals_SB, student_kl_SB
    return _launch_gradient("jensen_shannon", student_SBv, teacher_SBv, numbers, temperature, beta, out_SBv, lm)


KERNELS = {
    "kl_statistics": kl_statistics,
    "jensen_shannon_kls": jensen_shannon_kls,
    "forward_kl_gradient": forward_kl_gradient,
    "reverse_kl_gradient": reverse_kl_gradient,
    "jensen_shannon_gradient": jensen_shannon_gradient,
}


def _scale(grad: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """Return `grad / total / T` of each token, 0 where grad is 0, so that the kernel's threads need not divide."""
    return torch.where(grad == 0, 0.0, grad / lse[1] / temperature)


def _launch_gradient(
    divergence: str,
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    numbers_SB: tuple[Tensor, ...],
    temperature: float,
    beta: float,
    out_SBv: Tensor,
    lm: LMGradient | None,
) -> Tensor:
    """Launch `_gradient` with numbers z_peak, z_scale, t_peak; t_scale, the mean or log(z_total / t_total); KL(q || m).

    The kernel reads a token's numbers side by side, followed by the LM loss's peak, scale and gradient.
    """
    z_Nv, t_Nv = _rows(student_SBv), _rows(teacher_SBv)
    assert out_SBv.is_contiguous(), "the kernel writes rows side by side"
    num_tokens, width = z_Nv.shape
    block = _block(width, BLOCK)
    sizes = z_Nv.stride(0), t_Nv.stride(0), width, 1 / temperature, float(beta)
    lm_n = numbers_SB[:3] if lm is None else (lm.lse_2n[0], _scale(lm.grad_n, lm.lse_2n, 1.0), lm.grad_n)
    numbers_N8 = torch.stack([x.flatten() for x in (*numbers_SB, *lm_n)], dim=-1)
    column_N = numbers_N8 if lm is None else lm.column_n  # without LM neither is read
    grid = num_tokens, triton.cdiv(width, block)
    constants = {"DIVERGENCE": divergence, "LM": lm is not None, "BLOCK": block}
    _gradient[grid](z_Nv, t_Nv, numbers_N8, column_N, out_SBv, *sizes, **constants, num_warps=WARPS)  # pyright: ignore
    return out_SBv


def _block(width: int, most: int) -> int:
    return min(most, 1 << (width - 1).bit_length())


def _rows(logits_SBv: Tensor) -> Tensor:
    """Flatten [S, B, v] to [N, v], with contiguous columns."""
    logits_Nv = logits_SBv.detach().flatten(0, -2)
    return logits_Nv if logits_Nv.stride(-1) == 1 else logits_Nv.contiguous()

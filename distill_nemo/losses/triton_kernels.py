"""The functions of `eager.py` as Triton kernels, for CUDA; on CPU only through the interpreter (TRITON_INTERPRET=1).

Forward reads every logit once (online log-sum-exp; twice for Jensen-Shannon), one program to a token. Backward reads
once and writes once, one program to a token and block of columns; a token without a gradient is not read. With the LM
loss's gradient it reads the student's logits again, from the first cache. All sums run in fp32 and one order, without
atomics: the same bits every time.

Memory decides the time only while few instructions are spent on a column: an H200 has about 30 for one of student and
teacher in bf16. So logits are multiplied by 1/T, never divided; exponentials are the hardware's, of base 2; and no
number leaves its thread within a loop. tests/unit/test_kernels.py counts them in the code for sm_90.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_nemo.losses.cross_entropy import CrossEntropy

ONE_PASS = True  # see `eager.py`
# Forward: one thread has ROWS of the columns of a lane. Backward: BLOCK columns of one token.
ROWS, LANES, LANE_WARPS = 4, 1024, 4
BLOCK, WARPS = 4096, 8
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a peak before any column: finite, as -inf - -inf would be NaN


@triton.jit
def _load(logits, columns, width):
    return tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)


@triton.jit
def _exp(x):
    """`tl.exp` spends three more instructions on results below 1e-38, which are 0 here."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _weigh(weights, values):
    """Where weight 0 counts for nothing, be the value infinite."""
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def _statistics(
    P, Q, OUT, p_stride, q_stride, num_tokens, width, per_temperature, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Every lane has a peak and sums of its own, put together at the end."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x_peak, y_peak = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), LOWEST, tl.float32)
    x_sum, y_sum = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    weighed = tl.zeros((LANES,), tl.float32)
    for start in range(0, width, ROWS * LANES):
        x = _load(P + token * p_stride, start + block, width)
        y = _load(Q + token * q_stride, start + block, width)
        x_new = tl.maximum(x_peak, tl.max(x, 0) * per_temperature)
        y_new = tl.maximum(y_peak, tl.max(y, 0) * per_temperature)
        x_scale, y_scale = _exp(x_peak - x_new), _exp(y_peak - y_new)
        weights = _exp(x * per_temperature - x_new[None, :])
        x_sum = x_sum * x_scale + tl.sum(weights, 0)
        y_sum = y_sum * y_scale + tl.sum(_exp(y * per_temperature - y_new[None, :]), 0)
        weighed = _weigh(x_scale, weighed) + tl.sum(_weigh(weights, x - y), 0)
        x_peak, y_peak = x_new, y_new
    x_top, y_top = tl.max(x_peak, 0), tl.max(y_peak, 0)
    x_scale = _exp(x_peak - x_top)
    x_total, y_total = tl.sum(x_sum * x_scale, 0), tl.sum(y_sum * _exp(y_peak - y_top), 0)
    mean = tl.sum(_weigh(x_scale, weighed), 0) * per_temperature / x_total
    tl.store(OUT + token, x_top + tl.log(x_total))
    tl.store(OUT + num_tokens + token, tl.where(x_total == 0, 0.0, mean))
    tl.store(OUT + 2 * num_tokens + token, y_top + tl.log(y_total))


@triton.jit
def _log_ratios(log_p_q, beta):
    """See `eager._log_ratios`; exp(-|x|) - 1 in place of expm1."""
    share = tl.where(log_p_q > 0, 1 - beta, beta)
    larger = -tl.log(1 + share * (_exp(-tl.abs(log_p_q)) - 1))
    return larger + tl.minimum(log_p_q, 0.0), larger - tl.maximum(log_p_q, 0.0)


@triton.jit
def _jensen_shannon_kls(
    Z, T, Z_LSE, T_LSE, OUT, z_stride, t_stride, num_tokens, width, per_temperature, beta, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    z_lse, t_lse = tl.load(Z_LSE + token), tl.load(T_LSE + token)
    p_m, q_m = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_q = _load(Z + token * z_stride, columns, width) * per_temperature - z_lse
        log_p = _load(T + token * t_stride, columns, width) * per_temperature - t_lse
        log_p_m, log_q_m = _log_ratios(log_p - log_q, beta)
        p, q = _exp(log_p), _exp(log_q)
        p_m += _weigh(p, log_p_m)
        q_m += _weigh(q, log_q_m)
    tl.store(OUT + token, tl.sum(p_m, 0))
    tl.store(OUT + num_tokens + token, tl.sum(q_m, 0))


@triton.jit
def _gradient(
    Z, T, Z_LSE, OTHER, KL, GRAD, COLUMN, LM_LSE, LM_GRAD, OUT, z_stride, t_stride, width, per_temperature, beta,
    DIVERGENCE: tl.constexpr, LM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OTHER is the teacher's log-sum-exp, for reverse KL the mean. Jensen-Shannon alone reads KL, LM the next three."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad, z_lse, other = tl.load(GRAD + token), tl.load(Z_LSE + token), tl.load(OTHER + token)
    slope = tl.zeros((BLOCK,), tl.float32)
    if grad != 0:
        z = _load(Z + token * z_stride, columns, width)
        t = _load(T + token * t_stride, columns, width)
        log_q = z * per_temperature - z_lse
        q = _exp(log_q)
        if DIVERGENCE == "forward_kl":
            slope = q - _exp(t * per_temperature - other)
        elif DIVERGENCE == "reverse_kl":
            slope = _weigh(q, (z - t) * per_temperature - other)
        else:
            _, log_q_m = _log_ratios(t * per_temperature - other - log_q, beta)
            slope = _weigh(q, log_q_m - tl.load(KL + token)) * (1 - beta)
        slope = slope * (grad * per_temperature)
    if LM:
        lm_grad = tl.load(LM_GRAD + token)
        if lm_grad != 0:
            z = _load(Z + token * z_stride, columns, width)
            hit = tl.where(columns == tl.load(COLUMN + token), 1.0, 0.0)
            slope += lm_grad * (_exp(z - tl.load(LM_LSE + token)) - hit)
    tl.store(OUT + token * width + columns, slope.to(OUT.dtype.element_ty), mask=columns < width)


def kl_statistics(p_logits_SBv: Tensor, q_logits_SBv: Tensor, temperature: float) -> Tensor:
    """See `eager.kl_statistics`."""
    p_Nv, q_Nv = _rows(p_logits_SBv), _rows(q_logits_SBv)
    out = p_Nv.new_empty(3, *p_logits_SBv.shape[:-1], dtype=torch.float32)
    num_tokens, width = p_Nv.shape
    sizes = p_Nv.stride(0), q_Nv.stride(0), num_tokens, width, 1 / temperature
    lanes = _block(width, LANES)
    shape = {"ROWS": _block(width, ROWS * LANES) // lanes, "LANES": lanes}
    _statistics[(num_tokens,)](p_Nv, q_Nv, out, *sizes, **shape, num_warps=LANE_WARPS)  # pyright: ignore
    return out


def forward_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    teacher_lse_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
    lm: CrossEntropy | None = None,
) -> None:
    """See `eager.forward_kl_gradient`."""
    numbers = student_lse_SB, teacher_lse_SB, teacher_lse_SB, grad_SB
    _launch_gradient("forward_kl", student_SBv, teacher_SBv, numbers, temperature, 0.0, out_SBv, lm)


def reverse_kl_gradient(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    mean_SB: Tensor,
    grad_SB: Tensor,
    temperature: float,
    out_SBv: Tensor,
    lm: CrossEntropy | None = None,
) -> None:
    """See `eager.reverse_kl_gradient`."""
    numbers = student_lse_SB, mean_SB, mean_SB, grad_SB
    _launch_gradient("reverse_kl", student_SBv, teacher_SBv, numbers, temperature, 0.0, out_SBv, lm)


def jensen_shannon_kls(
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    student_lse_SB: Tensor,
    teacher_lse_SB: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """See `eager.jensen_shannon_kls`."""
    z_Nv, t_Nv = _rows(student_SBv), _rows(teacher_SBv)
    out = z_Nv.new_empty(2, *student_SBv.shape[:-1], dtype=torch.float32)
    num_tokens, width = z_Nv.shape
    sizes = z_Nv.stride(0), t_Nv.stride(0), num_tokens, width, 1 / temperature, float(beta)
    lse = student_lse_SB.contiguous(), teacher_lse_SB.contiguous()
    _jensen_shannon_kls[(num_tokens,)](z_Nv, t_Nv, *lse, out, *sizes, BLOCK=_block(width, BLOCK), num_warps=WARPS)  # pyright: ignore
    return out


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
    lm: CrossEntropy | None = None,
) -> None:
    """See `eager.jensen_shannon_gradient`."""
    numbers = student_lse_SB, teacher_lse_SB, student_kl_SB, grad_SB
    _launch_gradient("jensen_shannon", student_SBv, teacher_SBv, numbers, temperature, beta, out_SBv, lm)


def _launch_gradient(
    divergence: str,
    student_SBv: Tensor,
    teacher_SBv: Tensor,
    numbers_SB: tuple[Tensor, ...],
    temperature: float,
    beta: float,
    out_SBv: Tensor,
    lm: CrossEntropy | None,
) -> None:
    z_Nv, t_Nv = _rows(student_SBv), _rows(teacher_SBv)
    assert out_SBv.is_contiguous(), "gradient_buffer gives contiguous memory"
    num_tokens, width = z_Nv.shape
    block = _block(width, BLOCK)
    sizes = z_Nv.stride(0), t_Nv.stride(0), width, 1 / temperature, float(beta)
    numbers = [x.contiguous() for x in (*numbers_SB, *(lm or numbers_SB[:3]))]  # without LM these are never read
    grid = num_tokens, triton.cdiv(width, block)
    constants = {"DIVERGENCE": divergence, "LM": lm is not None, "BLOCK": block}
    _gradient[grid](z_Nv, t_Nv, *numbers, out_SBv, *sizes, **constants, num_warps=WARPS)  # pyright: ignore


def _block(width: int, most: int) -> int:
    return min(most, 1 << (width - 1).bit_length())


def _rows(logits_SBv: Tensor) -> Tensor:
    """[S, B, v] -> [N, v], columns side by side."""
    logits_Nv = logits_SBv.detach().flatten(0, -2)
    return logits_Nv if logits_Nv.stride(-1) == 1 else logits_Nv.contiguous()

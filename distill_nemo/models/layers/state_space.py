"""Mamba-2's convolution, scan and norm in plain torch, for machines on which mamba_ssm does not run.

Legend: B samples, S tokens, c chunks of l (or, as source, s) tokens, g groups of r heads, p channels of a head, n
numbers of the state of a channel, k tokens of the convolution, C its channels.
"""

import torch
from torch import Tensor
from torch.nn import functional


def causal_convolution(x_BSC: Tensor, weight_Ck: Tensor, bias_C: Tensor) -> Tensor:
    """Return `silu(sum_j weight[:, j] * x[:, t - k + 1 + j] + bias)` for every token t; before the first are zeros."""
    padded_BCS = functional.pad(x_BSC.transpose(1, 2), (weight_Ck.shape[1] - 1, 0))
    mixed_BCS = functional.conv1d(padded_BCS, weight_Ck[:, None], bias_C, groups=len(weight_Ck))
    return functional.silu(mixed_BCS).transpose(1, 2)


def scan(x_BSgrp: Tensor, dt_BSgr: Tensor, a_gr: Tensor, b_BSgn: Tensor, c_BSgn: Tensor, chunk: int) -> Tensor:
    """Return the outputs [B, S, g, r, p] of a linear recurrence, in fp32 or better.

    ```
    state = exp(dt[t] * a) * state + dt[t] * outer(x[t], b[t])  # zero before the first token
    y[t] = state @ c[t]
    ```

    Tokens of a chunk are mixed by products of matrices, as in attention, and only chunks one after another (Dao & Gu,
    "Transformers are SSMs", arXiv:2405.21060, section 6).
    """
    length = x_BSgrp.shape[1]
    chunk = min(chunk, length)
    inputs = (x_BSgrp * dt_BSgr[..., None], dt_BSgr * a_gr, b_BSgn, c_BSgn)
    x_Bclgrp, log_Bclgr, b_Bclgn, c_Bclgn = (_in_chunks(each, chunk) for each in inputs)
    decay_Bclgr = log_Bclgr.cumsum(2)  # logarithm of what is left of the chunk's first state
    lost_Bclsgr = decay_Bclgr[:, :, :, None] - decay_Bclgr[:, :, None]
    causal_ls = torch.ones(chunk, chunk, dtype=torch.bool, device=x_BSgrp.device).tril()
    left_Bclsgr = lost_Bclsgr.masked_fill(~causal_ls[:, :, None, None], -torch.inf).exp()
    scores_Bclsg = torch.einsum("Bclgn,Bcsgn->Bclsg", c_Bclgn, b_Bclgn)
    within = torch.einsum("Bclsgr,Bcsgrp->Bclgrp", scores_Bclsg[..., None] * left_Bclsgr, x_Bclgrp)
    kept_Bclgr = (decay_Bclgr[:, :, -1:] - decay_Bclgr).exp()
    states_Bcgrpn = torch.einsum("Bclgn,Bclgrp->Bcgrpn", b_Bclgn, x_Bclgrp * kept_Bclgr[..., None])
    first_Bcgrpn = _first_states(states_Bcgrpn, decay_Bclgr[:, :, -1].exp())
    before = torch.einsum("Bclgn,Bcgrpn->Bclgrp", c_Bclgn, first_Bcgrpn) * decay_Bclgr.exp()[..., None]
    return (within + before).flatten(1, 2)[:, :length]


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """Split the tokens, dimension 1, in chunks. Zeros after the last one do not change it."""
    missing = -x.shape[1] % chunk
    return functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)).unflatten(1, (-1, chunk))


def _first_states(states_Bcgrpn: Tensor, left_Bcgr: Tensor) -> Tensor:
    """Return the state before each chunk, from what each chunk adds and the fraction of a state that it leaves."""
    state, before = torch.zeros_like(states_Bcgrpn[:, 0]), []
    for added, left in zip(states_Bcgrpn.unbind(1), left_Bcgr.unbind(1), strict=True):
        before.append(state)
        state = state * left[..., None, None] + added
    return torch.stack(before, 1)


def gated_norm(y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, groups: int, eps: float) -> Tensor:
    """Return `x * rsqrt(mean(x^2) + eps) * weight` for `x = y * silu(z)`, the mean over the channels of a group."""
    x = (y_BSC * functional.silu(z_BSC.to(y_BSC.dtype))).unflatten(-1, (groups, -1))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x.flatten(-2) * weight_C

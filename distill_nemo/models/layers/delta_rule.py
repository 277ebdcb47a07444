"""The gated delta rule in torch, by chunks (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464, section 3.3).

Each head keeps a matrix S. A token with query q, key k (both of length 1), value v, decay a and write strength b does:

```
S = a * S
S = S + outer(k, b * (v - k @ S))
output = q @ S / sqrt(len(q))
```

Within a chunk, the values that its tokens write solve a triangular system. Chunks follow each other.

Shapes: B samples, S tokens, n heads, d channels; t tokens of a chunk, and m chunks.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64  # tokens, as in flash-linear-attention and transformers


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: object) -> tuple[Tensor, None]:
    """Return the outputs of all heads, and no state. Computed in fp32.

    Args:
        q: queries [B, S, n, d] of any length.
        k: keys, the same.
        v: values; their number of channels may differ.
        g: logarithms of decays [B, S, n].
        beta: write strengths, the same.

    Returns:
        tensor in the shape and dtype of `v`.
    """
    length, channels = v.shape[1], v.shape[3]
    q_mBntd, k_mBntd, v_mBntd = map(_in_chunks, (_of_length_1(q) * q.shape[3] ** -0.5, _of_length_1(k), v))
    beta_mBnt1 = _in_chunks(beta)[..., None]
    since_mBnt = _in_chunks(g).double().cumsum(-1)  # fp32 would lose digits in the differences
    later_tt = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).triu(1)
    exponents_mBntt = (since_mBnt[..., :, None] - since_mBnt[..., None, :]).float()
    decay_mBntt = exponents_mBntt.masked_fill(later_tt, -torch.inf).exp()  # of what an earlier token wrote
    kept_mBnt1 = since_mBnt.float().exp()[..., None]  # of the state before the chunk
    written_mBntd = k_mBntd * beta_mBnt1
    overlap_mBntt = (written_mBntd @ k_mBntd.mT * decay_mBntt).tril(-1)
    targets_mBntd = torch.cat([v_mBntd * beta_mBnt1, written_mBntd * kept_mBnt1], dim=-1)
    solved_mBntd = torch.linalg.solve_triangular(overlap_mBntt, targets_mBntd, upper=False, unitriangular=True)
    values, from_state = solved_mBntd.split([channels, q.shape[3]], dim=-1)
    scores_mBntt = q_mBntd @ k_mBntd.mT * decay_mBntt
    q_mBntd = q_mBntd * kept_mBnt1
    k_mBntd = k_mBntd * (since_mBnt[..., -1:] - since_mBnt).float().exp()[..., None]
    state_Bndd, outputs = v_mBntd.new_zeros(*k_mBntd.shape[1:3], q.shape[3], channels), []
    for i in range(len(values)):
        new_Bntd = values[i] - from_state[i] @ state_Bndd
        outputs.append(q_mBntd[i] @ state_Bndd + scores_mBntt[i] @ new_Bntd)
        state_Bndd = state_Bndd * kept_mBnt1[i, :, :, -1:] + k_mBntd[i].mT @ new_Bntd
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2).to(v.dtype), None


def _of_length_1(x: Tensor) -> Tensor:
    """Divide by the norm, in the dtype of `x`, as transformers does."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _in_chunks(x_BSn: Tensor) -> Tensor:
    """Return [m, B, n, t, ...] of [B, S, n, ...] in fp32. Zeros fill up the last chunk: they write nothing."""
    x_BnS = x_BSn.float().transpose(1, 2)
    padding = -x_BnS.shape[2] % CHUNK
    x_BnS = functional.pad(x_BnS, (0, 0) * (x_BnS.dim() - 3) + (0, padding)) if padding else x_BnS
    return x_BnS.unflatten(2, (-1, CHUNK)).movedim(2, 0)

"""Causal attention with capped scores, which torch's fused attention and Transformer Engine's lack.

Legend: p queries, the last of t positions, B samples, g key heads, r query heads to a key head, d channels of a head,
b queries of a block, k keys that they see, q = r * b rows of scores.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_nemo.models.architecture import QUERY_BLOCK


class Block(NamedTuple):
    """Consecutive queries, the keys that any of them sees, and the mask of those that each does not."""

    queries: slice
    keys: slice
    unseen_bk: Tensor


class CappedAttention(torch.autograd.Function):
    """`softmax(mask(c * tanh(scale / c * q @ k.T))) @ v`, by blocks of queries, in fp32 or better.

    Forward keeps no scores; backward computes them again from the saved log-sum-exp (FlashAttention-2, Dao 2023).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query_pBnd: Tensor,
        key_tBgd: Tensor,
        value_tBgd: Tensor,
        scale: float,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        """Return [p, B, n * d], in the dtype of the query.

        Args:
            ctx: of autograd.
            query_pBnd: queries of n = g * r heads.
            key_tBgd: keys.
            value_tBgd: values.
            scale: factor of the products of queries and keys.
            softcap: c.
            window: number of positions that a query sees, its own included; None: all up to its own.
        """
        query_Bgrpd, key_Bgtd, value_Bgtd = _by_head(query_pBnd, key_tBgd.shape[2]), *map(_keys, (key_tBgd, value_tBgd))
        out_Bgrpd, lse_Bgrp = torch.empty_like(query_Bgrpd), []
        for block in _blocks(query_pBnd.shape[0], key_tBgd.shape[0], window, query_pBnd.device):
            scores_Bgqk = _scores(query_Bgrpd, key_Bgtd, block, scale, softcap)[0]
            lse_Bgq = scores_Bgqk.logsumexp(-1, keepdim=True)
            weights_Bgqk = scores_Bgqk.sub_(lse_Bgq).exp_().to(value_Bgtd.dtype)
            out_Bgrpd[..., block.queries, :] = _unflat(weights_Bgqk @ value_Bgtd[:, :, block.keys], out_Bgrpd)
            lse_Bgrp.append(_unflat(lse_Bgq, out_Bgrpd))
            del scores_Bgqk, weights_Bgqk  # before the next block's
        out_pBm = out_Bgrpd.permute(3, 0, 1, 2, 4).flatten(2)
        ctx.save_for_backward(query_pBnd, key_tBgd, value_tBgd, out_pBm, torch.cat(lse_Bgrp, dim=3))
        ctx.settings = scale, softcap, window
        return out_pBm

    @staticmethod
    def backward(ctx: Any, gradient_pBm: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of queries, keys and values."""
        query_pBnd, key_tBgd, value_tBgd, out_pBm, lse_Bgrp1 = ctx.saved_tensors
        scale, softcap, window = ctx.settings
        groups = key_tBgd.shape[2]
        query_Bgrpd, key_Bgtd, value_Bgtd = _by_head(query_pBnd, groups), *map(_keys, (key_tBgd, value_tBgd))
        gradient_Bgrpd, out_Bgrpd = (_by_head(x.view_as(query_pBnd), groups) for x in (gradient_pBm, out_pBm))
        dot_Bgrp1 = (gradient_Bgrpd.to(lse_Bgrp1.dtype) * out_Bgrpd).sum(-1, keepdim=True)
        by_query_Bgrpd = torch.empty_like(query_Bgrpd)
        by_key_Bgtd, by_value_Bgtd = (torch.zeros_like(x, dtype=lse_Bgrp1.dtype) for x in (key_Bgtd, value_Bgtd))
        for block in _blocks(query_pBnd.shape[0], key_tBgd.shape[0], window, query_pBnd.device):
            rows, keys = block.queries, block.keys
            weights_Bgqk, by_product_Bgqk = _of_block(
                query_Bgrpd, key_Bgtd, value_Bgtd, gradient_Bgrpd, lse_Bgrp1, dot_Bgrp1, block, scale, softcap
            )
            by_value_Bgtd[:, :, keys] += weights_Bgqk.mT @ _flat(gradient_Bgrpd, rows)
            by_query_Bgrpd[..., rows, :] = _unflat(by_product_Bgqk @ key_Bgtd[:, :, keys], by_query_Bgrpd)
            by_key_Bgtd[:, :, keys] += by_product_Bgqk.mT @ _flat(query_Bgrpd, rows)
            del weights_Bgqk, by_product_Bgqk  # before the next block's
        by_query_pBnd = by_query_Bgrpd.permute(3, 0, 1, 2, 4).flatten(2, 3)
        by_key, by_value = (x.permute(2, 0, 1, 3).to(key_tBgd.dtype) for x in (by_key_Bgtd, by_value_Bgtd))
        return by_query_pBnd, by_key, by_value, None, None, None


def _of_block(
    query_Bgrpd: Tensor,
    key_Bgtd: Tensor,
    value_Bgtd: Tensor,
    gradient_Bgrpd: Tensor,
    lse_Bgrp1: Tensor,
    dot_Bgrp1: Tensor,
    block: Block,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return a block's softmax [B, g, q, k], and the gradient of its products of queries and keys."""
    rows, narrow = block.queries, query_Bgrpd.dtype
    scores_Bgqk, tanh_Bgqk = _scores(query_Bgrpd, key_Bgtd, block, scale, softcap)
    weights_Bgqk = scores_Bgqk.sub_(_flat(lse_Bgrp1, rows)).exp_()
    by_weight_Bgqk = (_flat(gradient_Bgrpd, rows) @ value_Bgtd[:, :, block.keys].mT).to(tanh_Bgqk.dtype)
    by_score_Bgqk = by_weight_Bgqk.sub_(_flat(dot_Bgrp1, rows)).mul_(weights_Bgqk)
    by_product_Bgqk = by_score_Bgqk.mul_(tanh_Bgqk.square_().neg_().add_(1)).mul_(scale)
    return weights_Bgqk.to(narrow), by_product_Bgqk.to(narrow)


def _by_head(x_pBnd: Tensor, groups: int) -> Tensor:
    """Return [B, g, r, p, d]."""
    return x_pBnd.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)


def _keys(x_tBgd: Tensor) -> Tensor:
    """Return [B, g, t, d]."""
    return x_tBgd.permute(1, 2, 0, 3)


def _flat(x_Bgrpd: Tensor, rows: slice) -> Tensor:
    """Return the rows of all heads that share keys, [B, g, q, d]."""
    return x_Bgrpd[..., rows, :].flatten(2, 3)


def _unflat(x_Bgqd: Tensor, like_Bgrpd: Tensor) -> Tensor:
    """Return [B, g, r, b, d]."""
    return x_Bgqd.unflatten(2, (like_Bgrpd.shape[2], -1))


def _blocks(queries: int, positions: int, window: int | None, device: torch.device) -> Iterator[Block]:
    before = positions - queries
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        first = 0 if window is None else max(0, before + start - window + 1)
        seen = torch.ones(stop - start, before + stop - first, dtype=torch.bool, device=device)
        own = before + start - first  # the first query's own position among the keys
        seen = seen.tril_(own) if window is None else seen.tril_(own).triu_(own - window + 1)
        yield Block(slice(start, stop), slice(first, before + stop), ~seen)


def _scores(query_Bgrpd: Tensor, key_Bgtd: Tensor, block: Block, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Return the capped scores [B, g, q, k] of a block, -inf for keys that a query does not see; and their tanh."""
    products_Bgqk = _flat(query_Bgrpd, block.queries) @ key_Bgtd[:, :, block.keys].mT
    wide = torch.promote_types(products_Bgqk.dtype, torch.float32)
    tanh_Bgqk = products_Bgqk.to(wide).mul_(scale / softcap).tanh_()
    scores_Bgrbk = _unflat(tanh_Bgqk * softcap, query_Bgrpd).masked_fill_(block.unseen_bk, -torch.inf)
    return scores_Bgrbk.flatten(2, 3), tanh_Bgqk

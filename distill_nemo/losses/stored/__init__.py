"""Losses against stored targets, one file per codec of `teacher_store`: how a teacher is written, how a student learns.

`hidden` stores the teacher's last hidden states, from which `losses/fused_linear` computes every divergence.
"""

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from distill_nemo.losses.collectives import Gather
from distill_nemo.losses.stored.loss import StoredLoss
from distill_nemo.losses.stored.sampled import Sampled
from distill_nemo.losses.stored.teacher import describe
from distill_nemo.losses.stored.top_k import TopK

Codec = Literal["sampled", "top_k", "hidden"]
STORED_LOSSES: dict[str, type[StoredLoss]] = {"sampled": Sampled, "top_k": TopK}


def encode(
    codec: Codec,
    num: int,
    temperature: float,
    logits_nv: Tensor,
    labels_n: Tensor,
    uniform_n: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> dict[str, Tensor]:
    """Return the arrays that a store keeps for some tokens, from the teacher's logits.

    Collectives: at most two all-gathers, of sums and of the K chosen ids; whole logits are on no rank.

    Args:
        codec: a codec; "hidden" keeps the hidden states beside these numbers.
        num: K, the number of draws ("sampled") or of ids ("top_k").
        temperature: T of the store.
        logits_nv: the teacher's logits of n tokens, this rank's shard of the vocabulary; padding holds -inf.
        labels_n: ids of the tokens that follow.
        uniform_n: one number in [0, 1) for each token, fp64; "sampled" alone uses it.
        group: the ranks that share the vocabulary; None: v is all of it.
        vocab_start: global index of this rank's first column.

    Returns:
        The same on every rank: `teacher.describe`'s numbers; with "sampled" also `ids` [n, K] (ascending, -1: none) and
        `counts` [n, K], int32, which sum to K; with "top_k" `ids`, `logprobs` [n, K] at T, and `tail` [n], the log of
        the probability of all other ids.
    """
    described = describe(logits_nv, labels_n, temperature, Gather(group), vocab_start)
    if codec == "hidden":
        return described.numbers
    chosen = STORED_LOSSES[codec](temperature, num).choose(logits_nv, described, uniform_n, Gather(group), vocab_start)
    return described.numbers | chosen

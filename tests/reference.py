"""Oracles of the losses in numpy fp64, which share no code with the package. N tokens, V vocabulary, H width.

Each returns the value per token and its derivative with respect to the student. Divergences are differentiated with
respect to the student's probabilities and then through the softmax, so none is the package's closed form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def through_softmax(value_by_q: Array, q: Array, temperature: float) -> Array:
    """Turn a derivative with respect to q = softmax(z / T) into one with respect to z."""
    return q * (value_by_q - (q * value_by_q).sum(axis=-1, keepdims=True)) / temperature


def finished(product_NV: Array, scale: float, softcap: float | None) -> tuple[Array, Array]:
    """Return scaled and capped logits, and their derivative with respect to output weight times hidden state."""
    if softcap is None:
        return scale * product_NV, np.full_like(product_NV, scale)
    x = scale * product_NV / softcap
    return softcap * np.tanh(x), scale / np.cosh(x) ** 2


def forward_kl(student_NV: Array, teacher_NV: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """KL(teacher || student)."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    return (p * np.log(p / q)).sum(axis=-1), through_softmax(-p / q, q, temperature)


def reverse_kl(student_NV: Array, teacher_NV: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """KL(student || teacher)."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    return (q * np.log(q / p)).sum(axis=-1), through_softmax(np.log(q / p) + 1, q, temperature)


def jensen_shannon(
    student_NV: Array, teacher_NV: Array, temperature: float = 1.0, beta: float = 0.5
) -> tuple[Array, Array]:
    """Beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    m, m_by_q = beta * p + (1 - beta) * q, 1 - beta
    value = beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)
    value_by_m = -beta * p / m - (1 - beta) * q / m
    return value.sum(axis=-1), through_softmax((1 - beta) * (np.log(q / m) + 1) + value_by_m * m_by_q, q, temperature)


def top_k_forward_kl(
    student_NV: Array, teacher_NV: Array, temperature: float = 1.0, top_k: int = 1
) -> tuple[Array, Array]:
    """Return KL(teacher || student) of the teacher's top k tokens, lowest first on ties, and a bucket for others."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    width = p.shape[-1]
    order = np.argsort(-teacher_NV, axis=-1, kind="stable")
    bucket_NV = np.zeros_like(order)  # 0, 1, ..., k - 1, and k for the rest
    np.put_along_axis(bucket_NV, order, np.broadcast_to(np.minimum(np.arange(width), top_k), order.shape), axis=-1)
    member_NmV = bucket_NV[..., None, :] == np.arange(min(top_k + 1, width))[:, None]
    p_Nm, q_Nm = (member_NmV * p[..., None, :]).sum(axis=-1), (member_NmV * q[..., None, :]).sum(axis=-1)
    value_by_q = -(member_NmV * (p_Nm / q_Nm)[..., None]).sum(axis=-2)
    return (p_Nm * np.log(p_Nm / q_Nm)).sum(axis=-1), through_softmax(value_by_q, q, temperature)


def systematic_counts(teacher_V: Array, temperature: float, num: int, uniform: float) -> NDArray[np.int64]:
    """Return the draws of each id, by the differences of rounded multiples of the cumulative distribution."""
    sums = np.cumsum(softmax(teacher_V / temperature))
    stops = np.clip(np.ceil(num * sums - uniform), 0, num).astype(np.int64)
    stops[sums >= sums[-1]] = num
    return np.diff(stops, prepend=0)


def sampled(
    student_NV: Array, teacher_NV: Array, counts_NV: Array, num: int, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Return the cross entropy against counts / num, less the teacher's entropy."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    value = -(counts_NV / num * np.log(q)).sum(axis=-1) + (p * np.log(p)).sum(axis=-1)
    return value, through_softmax(-counts_NV / num / q, q, temperature)


Oracle = Callable[..., tuple[Array, Array]]


class Expected(NamedTuple):
    """Expected properties of a divergence."""

    arguments: dict[str, Any]  # arguments of LogitsKLLoss
    oracle: Oracle
    num_gathers: int = 1
    num_bytes: int = 20  # bytes gathered per token and rank; with top-k it depends on the shard
    num_saved: int = 4  # fp32 numbers per token saved for backward; likewise


DIVERGENCES = {
    "forward_kl": Expected({"divergence": "forward_kl"}, forward_kl),
    "reverse_kl": Expected({"divergence": "reverse_kl"}, reverse_kl),
    "jensen_shannon": Expected({"divergence": "jensen_shannon"}, jensen_shannon, 2, 24, 5),
    "jensen_shannon 0.1": Expected(
        {"divergence": "jensen_shannon", "beta": 0.1}, partial(jensen_shannon, beta=0.1), 2, 24, 5
    ),
    "top 1": Expected({"top_k": 1}, partial(top_k_forward_kl, top_k=1)),
    "top 20": Expected({"top_k": 20}, partial(top_k_forward_kl, top_k=20)),
    "top 300": Expected({"top_k": 300}, partial(top_k_forward_kl, top_k=300)),  # more than a shard of four holds
}


def entropy(logits_NV: Array) -> Array:
    p = softmax(logits_NV)
    return -(p * np.log(p)).sum(axis=-1)


def cosine(student_NH: Array, teacher_NH: Array) -> tuple[Array, Array]:
    """Return 1 - cos."""
    student_norm = np.sqrt((student_NH**2).sum(axis=-1, keepdims=True))
    teacher_norm = np.sqrt((teacher_NH**2).sum(axis=-1, keepdims=True))
    cos = (student_NH * teacher_NH).sum(axis=-1, keepdims=True) / (student_norm * teacher_norm)
    gradient = cos * student_NH / student_norm**2 - teacher_NH / (student_norm * teacher_norm)
    return 1 - cos[..., 0], gradient


def mse(student_NH: Array, teacher_NH: Array) -> tuple[Array, Array]:
    difference = student_NH - teacher_NH
    return (difference**2).mean(axis=-1), 2 * difference / difference.shape[-1]

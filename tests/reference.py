"""What the losses should be, in numpy fp64, sharing no code with the package. N tokens, V vocabulary, H width.

Each returns the value per token and its derivative with respect to the student.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def forward_kl(student_NV: Array, teacher_NV: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """KL(teacher || student); the derivative is that of the value, not (q - p) / T written down."""
    p, q = softmax(teacher_NV / temperature), softmax(student_NV / temperature)
    value = (p * np.log(p / q)).sum(axis=-1)
    value_by_q = -p / q
    gradient = q * (value_by_q - (q * value_by_q).sum(axis=-1, keepdims=True)) / temperature
    return value, gradient


def entropy(logits_NV: Array) -> Array:
    p = softmax(logits_NV)
    return -(p * np.log(p)).sum(axis=-1)


def cosine(student_NH: Array, teacher_NH: Array) -> tuple[Array, Array]:
    """1 - cos."""
    student_norm = np.sqrt((student_NH**2).sum(axis=-1, keepdims=True))
    teacher_norm = np.sqrt((teacher_NH**2).sum(axis=-1, keepdims=True))
    cos = (student_NH * teacher_NH).sum(axis=-1, keepdims=True) / (student_norm * teacher_norm)
    gradient = cos * student_NH / student_norm**2 - teacher_NH / (student_norm * teacher_norm)
    return 1 - cos[..., 0], gradient


def mse(student_NH: Array, teacher_NH: Array) -> tuple[Array, Array]:
    difference = student_NH - teacher_NH
    return (difference**2).mean(axis=-1), 2 * difference / difference.shape[-1]

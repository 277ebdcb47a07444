"""Numbers in as few whole bytes as they need. Nothing loops over tokens in Python.

Legend: n numbers, b bytes of each.
"""

import numpy as np


def bytes_of(largest: int) -> int:
    """Return the number of bytes that hold 0 to `largest`."""
    return max((largest.bit_length() + 7) // 8, 1)


def pack_numbers(values: np.ndarray, num_bytes: int) -> np.ndarray:
    """Return the lowest bytes of non-negative integers [...], little-endian, uint8 [..., b]."""
    wide = np.ascontiguousarray(values, "<u8").view(np.uint8).reshape(*values.shape, 8)
    return np.ascontiguousarray(wide[..., :num_bytes])


def unpack_numbers(packed: np.ndarray) -> np.ndarray:
    """Return the integers of `pack_numbers`: int32 [...] from up to 3 bytes each, else int64."""
    kind = np.dtype("<i4") if packed.shape[-1] < 4 else np.dtype("<i8")
    wide = np.zeros((*packed.shape[:-1], kind.itemsize), np.uint8)
    wide[..., : packed.shape[-1]] = packed
    return wide.view(kind)[..., 0]


def pack_bits(values: np.ndarray) -> np.ndarray:
    """Return one bit for each number, 1 where it is not 0, uint8 [ceil(n / 8)]."""
    return np.packbits(values != 0, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int) -> np.ndarray:
    """Return `count` numbers, uint8, 0 or 1."""
    return np.unpackbits(packed, count=count, bitorder="little")

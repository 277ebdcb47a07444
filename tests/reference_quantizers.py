"""Roundings of quantised models in numpy and fp64, by their definitions. No code is shared with the package."""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(  # by code, so that an even index has an even mantissa
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)


def nearest(magnitudes, grid):
    """Return the nearest number of a grid; of two, that with the even index; beyond the last, the last."""
    above = np.searchsorted(grid, magnitudes).clip(1, len(grid) - 1)
    down, up = magnitudes - grid[above - 1], grid[above] - magnitudes
    return grid[np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)]


def fp8(x, amax):
    """E4M3, with one scale."""
    x = np.asarray(x, np.float64)
    scale = np.float64(amax) / 448
    return np.sign(x) * nearest(np.abs(x) / scale, E4M3) * scale


def nvfp4(x, amax):
    """E2M1 in blocks of 16, whose scales are E4M3 numbers times one of the tensor."""
    x = np.asarray(x, np.float64)
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    of_tensor = np.float64(amax) / 6 / 448
    scale = nearest(np.abs(blocks).max(-1, keepdims=True) / 6 / of_tensor, E4M3) * of_tensor
    scale = np.where(scale < 1e-5, 1, scale)  # ModelOpt's kernel gives up on such a block
    return (np.sign(blocks) * nearest(np.abs(blocks) / scale, E2M1) * scale).reshape(x.shape)


def integers(x, amax, bits):
    """Integers from -2^(bits-1) on, of which the largest stands for the amax."""
    x, largest = np.asarray(x, np.float64), 2 ** (bits - 1) - 1
    scale = np.asarray(amax, np.float64) / largest
    return np.rint(x / scale).clip(-largest - 1, largest) * scale


def int8(x, amax):
    """8 bits; an amax for all, or [rows, 1]."""
    return integers(x, amax, 8)


def int4(x, amax, block):
    """4 bits in blocks of a row; amax [rows, blocks]."""
    x = np.asarray(x, np.float64)
    rounded = integers(x.reshape(len(x), -1, block), np.asarray(amax).reshape(len(x), -1, 1), 4)
    return rounded.reshape(x.shape)

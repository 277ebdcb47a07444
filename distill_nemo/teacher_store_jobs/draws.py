"""Random numbers of a store: a function of seed, window and position alone, the same at every layout."""

import numpy as np


def uniforms(seed: int, window: int, length: int) -> np.ndarray:
    """Return a number in [0, 1) for each position of a window, float64 [length], 53 random bits each.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the key (seed, window).
    """
    bits = np.random.Philox(key=np.array([seed, window], dtype=np.uint64)).random_raw(length)
    return (bits >> np.uint64(11)) * 2.0**-53

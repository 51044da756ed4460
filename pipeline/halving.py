"""Half the size of class indices and of probabilities, without those that were not examined: what a pyramid is built of."""

from __future__ import annotations

import numpy as np

from pipeline.classes import IGNORED


def halve_labels(fine: np.ndarray) -> np.ndarray:
    """The most frequent of each 2 x 2 labels, not counting IGNORED; the lowest of equally frequent ones.

    (2 h, 2 w) uint8 to (h, w) uint8; IGNORED only where all four are.
    """
    pairs = _pairs(fine)
    upper, lower = pairs[0::2].ravel(), pairs[1::2].ravel()
    coarse = (upper & 255).astype(np.uint8)
    alike = coarse * np.uint16(257)
    mixed = np.flatnonzero((upper != alike) | (lower != alike))
    four = np.stack([half[mixed] >> shift & 255 for half in (upper, lower) for shift in (0, 8)])
    votes = np.stack([(four == label).sum(axis=0) for label in four])
    rank = np.where(four == IGNORED, 0, votes * 256 + (IGNORED - four))
    coarse[mixed] = IGNORED - rank.max(axis=0, initial=0) % 256
    return coarse.reshape(len(pairs) // 2, -1)


def halve_probabilities(fine: np.ndarray, examined: np.ndarray) -> np.ndarray:
    """The mean of each 2 x 2 probabilities over the examined pixels, rounded; 0 where there are none.

    (C, 2 h, 2 w) uint8, 0 where not examined, and (2 h, 2 w) bool to (C, h, w) uint8.
    """
    count = _sums(examined.view(np.uint8))
    partial = count < 4
    few = count[partial]
    coarse = np.empty((len(fine), *count.shape), np.uint8)
    for channel, means in zip(fine, coarse, strict=True):
        total = _sums(channel)
        means[...] = (total + 2) >> 2
        means[partial] = (2 * total[partial] + few) // np.maximum(2 * few, 1)
    return coarse


def _sums(fine: np.ndarray) -> np.ndarray:
    """(2 h, 2 w) uint8 to (h, w) uint16: the sum of each 2 x 2."""
    pairs = _pairs(fine)
    across = (pairs & 255) + (pairs >> 8)
    return np.asarray(across[0::2] + across[1::2])


def _pairs(fine: np.ndarray) -> np.ndarray:
    """(h, 2 w) uint8 to (h, w) uint16: the left one of two neighbours in the lower byte (numpy is slow at strides)."""
    return np.ascontiguousarray(fine).view("<u2")

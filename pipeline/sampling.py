"""Resampling along an axis in whole numbers: each pixel is made from the same source pixels, however a slide is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_SNAP = 0.05  # pixels of drift over a whole slide below which a scale counts as a whole number
_WEIGHT_BITS = 8  # 255 * 2**8 and its rounding still fit in 16 bits


@dataclass(frozen=True)
class Sampling:
    """How the pixels of one axis are made: `weights` @ source / 2**8, for source pixels from `start` on.

    `weights` is a sparse (pixels, source pixels) matrix of uint16 whose rows sum to 2**8.
    """

    start: int
    weights: sparse.csr_array

    @property
    def length(self) -> int:
        """Number of source pixels."""
        return int(self.weights.shape[1])


def sampling(start: int, count: int, scale: float, lattice_size: int) -> Sampling:
    """The sampling of pixels start ... start + count - 1 of an axis, each `scale` source pixels wide."""
    if abs(scale - round(scale)) * lattice_size < _SNAP and round(scale) >= 1:
        scale = float(round(scale))
    index = np.arange(start, start + count)
    if scale >= 1:
        low, high = index * scale, (index + 1) * scale
        taps = math.ceil(scale) + (0 if scale == round(scale) else 1)
    else:
        low = (index + 0.5) * scale - 0.5
        high, taps = low + 1, 2
    first = np.floor(low + 1e-9).astype(np.int64)
    edges = first[:, None] + np.arange(taps + 1)
    overlap = np.diff(np.clip(edges, low[:, None], high[:, None]), axis=1)
    weights = _whole_weights(overlap / overlap.sum(axis=1, keepdims=True))
    origin = int(first[0])
    columns = first[:, None] - origin + np.arange(taps)
    rows = np.arange(0, count * taps + 1, taps)
    matrix = sparse.csr_array((weights.ravel(), columns.ravel(), rows), shape=(count, int(first[-1]) + taps - origin))
    matrix.eliminate_zeros()
    return Sampling(origin, matrix)


def _whole_weights(weights: np.ndarray) -> np.ndarray:
    """Weights as whole 256ths, none below 0, whose sum is exactly 256: what rounding leaves of one, the next one has."""
    ends = np.rint(np.cumsum(weights, axis=1) * (1 << _WEIGHT_BITS))
    return np.asarray(np.diff(ends, axis=1, prepend=0), np.uint16)


def resample_rows(pixels: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Weighted sums of rows, (source rows, columns, 3) to (rows, columns, 3) uint8, in whole numbers: no rounding noise."""
    rows, sources = sampling.weights.shape
    if rows == sources == sampling.weights.nnz:
        return pixels
    total = sampling.weights @ pixels.reshape(sources, -1).astype(np.uint16)
    total += 1 << (_WEIGHT_BITS - 1)
    total >>= _WEIGHT_BITS
    return np.asarray(total, np.uint8).reshape(rows, *pixels.shape[1:])

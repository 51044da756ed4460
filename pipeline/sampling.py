"""Resampling along an axis in whole numbers: each pixel is made from the same source pixels, however a slide is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_SNAP = 0.05  # pixels of drift over a whole slide below which a scale counts as a whole number
_WEIGHT_BITS = 8  # 255 * 2**8 and its rounding still fit in 16 bits
_HALF = 1 << (_WEIGHT_BITS - 1)
_ROWS = 64  # made at once, so that their sums stay in the cache


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
    if _is_identity(sampling.weights):
        return pixels
    total = sampling.weights @ pixels.reshape(len(pixels), -1).astype(np.uint16)
    total += _HALF
    total >>= _WEIGHT_BITS
    return np.asarray(total, np.uint8).reshape(-1, *pixels.shape[1:])


def resample_columns(pixels: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same sums of columns, (rows, source columns, 3) to (rows, columns, 3) uint8.

    Columns are gathered tap by tap: a product with the transposed pixels, and transposing them back, takes twice the time.
    """
    if _is_identity(sampling.weights):
        return pixels
    taps, flat = _taps(sampling.weights), pixels.reshape(len(pixels), -1)
    made = np.empty((len(pixels), sampling.weights.shape[0], 3), np.uint8)
    for top in range(0, len(pixels), _ROWS):
        rows = flat[top : top + _ROWS]
        total = np.full((len(rows), made[0].size), _HALF, np.uint16)
        for columns, weights in taps:
            total += np.take(rows, columns, axis=1) * weights
        made[top : top + _ROWS] = (total >> _WEIGHT_BITS).reshape(len(rows), -1, 3)
    return made


def _is_identity(weights: sparse.csr_array) -> bool:
    count, sources = weights.shape
    return bool(count == sources == weights.nnz)


def _taps(weights: sparse.csr_array) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the first source pixel of each pixel, then for the second, and so on: where its three values lie in a row of
    values, and their weights, uint16; a weight of 0 where a pixel has no more sources.
    """
    held, starts = np.diff(weights.indptr), weights.indptr[:-1]
    taps = []
    for tap in range(int(held.max())):
        place = np.minimum(starts + tap, weights.nnz - 1)
        columns = 3 * weights.indices[place].astype(np.intp)[:, None] + np.arange(3)
        taps.append((columns.ravel(), np.where(tap < held, weights.data[place], 0).astype(np.uint16).repeat(3)))
    return taps

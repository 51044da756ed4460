"""How far the boundaries of a class lie from where they should, in micrometres: HD95 and normalised surface Dice.

The boundary of a class is its pixels with a side towards a known pixel of another class; where a class is merely cut off,
by the edge of the slide or of what is known, it has none. With B the boundary of the truth, P that of the prediction, and d
the distance from a pixel's centre to the nearest of the other boundary in the same field:

    HD95   max( d95(B -> P), d95(P -> B) )                     d95: within which 95 % of a boundary lie
    NSD    (|{B: d <= t}| + |{P: d <= t}|) / (|B| + |P|)       t: the tolerance

Where the field has none of the other boundary, d is the field's diagonal. A boundary's length is its number of pixels times
their size, so that fields read at different scales add up. Distances are kept to three figures.

References: HD95: Huttenlocher, Klanderman and Rucklidge 1993, IEEE TPAMI 15:850, doi:10.1109/34.232073 (the partial
Hausdorff distance), of both directions the larger, as MONAI's `compute_hausdorff_distance`. NSD: Nikolov et al. 2021, J Med
Internet Res 23:e26151, doi:10.2196/26151. When to use which: Maier-Hein et al. 2024, Nature Methods 21:195,
doi:10.1038/s41592-023-02151-z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

from pipeline.bootstrap import Counts, Floats
from pipeline.geometry import Mpp

Mask = npt.NDArray[np.bool_]

_SHARE = 0.95
_ROUNDING = 1e-9  # share by which a distance may pass the tolerance: 1.8 um twice is more than 3.6 by a bit
_FIGURES = 3


@dataclass(frozen=True, eq=False)
class Spread:
    """How the distances of one boundary to another are spread: ascending `um`, (n,), and the `length` at each, in um."""

    um: Floats
    length: Floats

    @classmethod
    def gathered(cls, parts: Sequence[Spread]) -> Spread:
        """All of some spreads."""
        um, place = np.unique(np.concatenate([np.empty(0), *(part.um for part in parts)]), return_inverse=True)
        length = np.concatenate([np.empty(0), *(part.length for part in parts)])
        return cls(um, np.bincount(place, length, len(um)).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Boundaries:
    """What the boundaries of one class add to its scores: `within` is the length of both inside the tolerance."""

    from_truth: Spread
    from_prediction: Spread
    within: float

    @classmethod
    def gathered(cls, parts: Sequence[Boundaries]) -> Boundaries:
        """All of some fields or slides."""
        return cls(
            Spread.gathered([part.from_truth for part in parts]),
            Spread.gathered([part.from_prediction for part in parts]),
            sum((part.within for part in parts), 0.0),
        )

    @property
    def length(self) -> float:
        """Length of both boundaries in um."""
        return float(self.from_truth.length.sum() + self.from_prediction.length.sum())


def measure_boundaries(truth: Mask, prediction: Mask, known: Mask, mpp: Mpp, tolerance_um: float) -> Boundaries:
    """The distances between the boundaries of one class in one field.

    `truth`, `prediction` and `known` are (rows, columns) bool; what is not known is in neither of the first two.
    """
    one, other = (mask & ndimage.binary_dilation(known & ~mask) for mask in (truth, prediction))
    there, back = _distances(one, other, mpp), _distances(other, one, mpp)
    size, reach = math.sqrt(mpp.area_um2), tolerance_um * (1 + _ROUNDING)
    near = (there <= reach).sum() + (back <= reach).sum()
    within = size * float(near) if one.any() and other.any() else 0.0  # else `there` is a field's diagonal, however short
    return Boundaries(_spread(there, size), _spread(back, size), within)


def surface_dice(patients: Sequence[Boundaries], draws: Counts) -> Floats:
    """NSD of each round, (S,): `draws` is (S, P), how often each of P patients counts. NaN where there is no boundary."""
    lengths = np.array([[patient.within, patient.length] for patient in patients])
    within, length = (draws @ lengths).T
    with np.errstate(invalid="ignore"):
        return np.asarray(within / length)


def hd95(patients: Sequence[Boundaries], draws: Counts) -> Floats:
    """HD95 in um of each round, (S,): `draws` is (S, P), how often each of P patients counts. NaN without a boundary."""
    there = _percentile([patient.from_truth for patient in patients], draws)
    back = _percentile([patient.from_prediction for patient in patients], draws)
    return np.fmax(there, back)


def _percentile(spreads: Sequence[Spread], draws: Counts) -> Floats:
    """The distance within which 95 % of the pooled boundary lie, in each round."""
    um = np.unique(np.concatenate([spread.um for spread in spreads]))
    if not len(um):
        return np.full(len(draws), np.nan)
    lengths = np.zeros((len(spreads), len(um)))
    for row, spread in zip(lengths, spreads, strict=True):
        row[np.searchsorted(um, spread.um)] = spread.length
    reached = np.cumsum(draws @ lengths, axis=1)
    total = reached[:, -1:]
    return np.where(total[:, 0] > 0, um[(reached >= _SHARE * total * (1 - 1e-12)).argmax(axis=1)], np.nan)


def _distances(own: Mask, other: Mask, mpp: Mpp) -> Floats:
    """The distance, in um, from each pixel of a boundary to the nearest of another."""
    if not other.any():
        return np.full(int(own.sum()), math.hypot(own.shape[0] * mpp.y, own.shape[1] * mpp.x))
    scale = [mpp.y, mpp.x]
    return np.asarray(KDTree(np.argwhere(other) * scale).query(np.argwhere(own) * scale)[0])


def _spread(distances: Floats, size: float) -> Spread:
    power = 10.0 ** (np.floor(np.log10(np.maximum(distances, 1e-6))) - _FIGURES + 1)
    um, counts = np.unique(np.round(np.round(distances / power) * power, 6), return_counts=True)
    return Spread(um, counts.astype(np.float64) * size)

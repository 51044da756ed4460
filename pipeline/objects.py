"""Objects, matched between truth and prediction as in the GlaS challenge: F1, object Dice and object Hausdorff distance.

An object is a connected component, by sides and corners, of the pixels of one class. With G the objects of the truth, S
those of the prediction, |.| areas, and S*(G_i) the S that shares most pixels with G_i (and G*(S_j) the other way round):

    object F1          2 TP / (|{S}| + |{G}|)     TP: the S_j that cover more than half of G*(S_j)
    object Dice        1/2 [ sum_i g_i Dice(G_i, S*(G_i)) + sum_j s_j Dice(G*(S_j), S_j) ]
    object Hausdorff   1/2 [ sum_i g_i H(G_i, S*(G_i))    + sum_j s_j H(G*(S_j), S_j) ]

    g_i = |G_i| / sum |G|,   s_j = |S_j| / sum |S|,   H(A, B) = max(max_a min_b |a - b|, max_b min_a |a - b|) over pixels

An object that meets none has a Dice of 0, and the H to that object of its field which gives the smallest. Where the field
has none, H is the field's diagonal; the challenge gives infinity. The sums run over all fields of all slides of a split. The
challenge's truth also tells touching glands apart; here what touches within a class is one object, in truth and prediction.
And of the prediction only that counts which is large enough to be delivered as a region (see `delivered`); of the truth all
does, and what is too small to be delivered is missed. What is cut off by the edge of what is known counts in both.

Reference: Sirinukunwattana et al. 2017, Gland segmentation in colon histology images: the GlaS challenge contest, Medical
Image Analysis 35:489, doi:10.1016/j.media.2016.08.008, and the challenge's evaluation code (which asks for more than half).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

from pipeline.bootstrap import Counts, Floats
from pipeline.geometry import Mpp

Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice]

OBJECT_SCORES = ("object_f1", "object_dice", "object_hausdorff_um")
"""The scores, in the order in which a report lists them."""

OBJECT_SUMS = 9
"""Matched objects, then number, area in um2, area x Dice, area x H of the truth's objects, then of the prediction's."""

TRUE_COUNT, CALLED_COUNT, MATCHED = 1, 5, 0
"""Where in these sums the numbers of the truth's objects, of the prediction's, and of those matched are."""

_EIGHT = np.ones((3, 3), bool)


def delivered(prediction: Mask, edge: Mask, mpp: Mpp, min_area_um2: float) -> Mask:
    """A class of the prediction without what is too small to be delivered: (rows, columns) bool, as all that it takes.

    As in regions.py, what is connected by sides is one, and less than `min_area_um2` too small; by a corner two of them may
    then be one object. But what reaches the `edge` of what is known may go on beyond, and is kept.
    """
    numbers, count = ndimage.label(prediction, output=np.int32)
    kept = np.bincount(numbers.ravel(), minlength=count + 1) * mpp.area_um2 >= min_area_um2
    kept[numbers[edge]] = True
    return np.asarray(prediction & kept[numbers])


def object_sums(truth: Mask, prediction: Mask, mpp: Mpp) -> Floats:
    """What the objects of one class in one field add to its scores: see OBJECT_SUMS; (9,) float64.

    `truth` and `prediction` are (rows, columns) bool, both false where nothing is known; see `delivered`.
    """
    true, called = _Objects.find(truth, mpp), _Objects.find(prediction, mpp)
    pairs = _Pairs(true, called)
    diagonal_um = float(np.hypot(truth.shape[0] * mpp.y, truth.shape[1] * mpp.x))
    partners, shared = pairs.partners(of_truth=False)
    matched = (shared[partners >= 0] > true.pixels[partners[partners >= 0]] / 2).sum()
    return np.array([matched, *pairs.weighted(True, diagonal_um), *pairs.weighted(False, diagonal_um)])


def object_scores(sums: Floats) -> dict[str, Floats]:
    """The scores of (..., 9) sums by name, each (...); NaN where there are no objects at all.

    Dice and Hausdorff are the mean of both directions; where one side has no objects, F1 and Dice are 0.
    """
    matched, true, true_area, true_dice, true_h, called, called_area, called_dice, called_h = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore"):
        distances = np.stack([true_h / true_area, called_h / called_area])
        there = (~np.isnan(distances)).sum(axis=0)
        dice = true_dice / np.maximum(true_area, 1e-12) + called_dice / np.maximum(called_area, 1e-12)
        return {
            "object_f1": 2 * matched / (true + called),
            "object_dice": np.where(there, dice / 2, np.nan),
            "object_hausdorff_um": np.nansum(distances, axis=0) / there,
        }


@dataclass(frozen=True, eq=False)
class _Objects:
    """Objects 0, 1, ...: `labels` is (rows, columns) int32, number + 1 or 0; `pixels` and `boxes` have one item each."""

    labels: npt.NDArray[np.int32]
    pixels: Counts
    boxes: list[Box]
    mpp: Mpp
    _outlines: dict[int, tuple[Counts, KDTree]] = field(default_factory=dict)

    @classmethod
    def find(cls, mask: Mask, mpp: Mpp) -> _Objects:
        labels, count = ndimage.label(mask, _EIGHT, output=np.int32)
        return cls(labels, np.bincount(labels.ravel(), minlength=count + 1)[1:], ndimage.find_objects(labels), mpp)

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def edges_um(self) -> Floats:
        """(n, 4): the outermost pixels' top, left, bottom and right."""
        edges = [(rows.start, columns.start, rows.stop - 1, columns.stop - 1) for rows, columns in self.boxes]
        return np.array(edges, np.float64).reshape(-1, 4) * [self.mpp.y, self.mpp.x, self.mpp.y, self.mpp.x]

    def outline(self, number: int) -> tuple[Counts, KDTree]:
        """The object's pixels with a side that is not shared with another of them: (n, 2) row, column; and in um, a tree."""
        if number not in self._outlines:
            box = self.boxes[number]
            mask = self.labels[box] == number + 1
            places = np.argwhere(mask & ~ndimage.binary_erosion(mask)) + [box[0].start, box[1].start]
            self._outlines[number] = places, KDTree(places * [self.mpp.y, self.mpp.x])
        return self._outlines[number]

    def farthest(self, number: int, other: _Objects, target: int) -> float:
        """The largest distance, in um, from a pixel of one object to the nearest pixel of another.

        Such a pixel lies on the outline or within the other's box: elsewhere a step away from that box is a step away from
        all of the other. Of the outline only what may be farthest is looked up: a pixel's distances to the other and to one
        of its pixels differ by no more than the diagonal of its box.
        """
        (outline, tree), (_, nearest) = self.outline(number), other.outline(target)
        reach = np.hypot(*(tree.data - nearest.data[0]).T)
        diagonal = np.hypot(*(other.edges_um[target][2:] - other.edges_um[target][:2]))
        box = _common(self.boxes[number], other.boxes[target])
        inside = np.argwhere(self.labels[box] == number + 1) + [box[0].start, box[1].start]
        places = np.concatenate([outline[reach >= reach.max() - diagonal], inside])
        apart = places[other.labels[tuple(places.T)] != target + 1]
        return float(nearest.query(apart * [self.mpp.y, self.mpp.x])[0].max(initial=0.0))


class _Pairs:
    """Which objects of truth and prediction belong together, and how far apart they are."""

    def __init__(self, true: _Objects, called: _Objects) -> None:
        both = (true.labels > 0) & (called.labels > 0)
        joint = (true.labels[both] - 1).astype(np.int64) * max(len(called), 1) + called.labels[both] - 1
        keys, self._shared = np.unique(joint, return_counts=True)
        self._truths, self._calls = np.divmod(keys, max(len(called), 1))
        self._true, self._called = true, called
        self._distances: dict[tuple[int, int], float] = {}

    def partners(self, of_truth: bool) -> tuple[Counts, Counts]:
        """For each object of one side, (n,) int64: the number of the other side's object that it overlaps most, -1 where it
        overlaps none; and the overlap in pixels.
        """
        own, other = (self._truths, self._calls) if of_truth else (self._calls, self._truths)
        order = np.lexsort((other, -self._shared, own))
        numbers, first = np.unique(own[order], return_index=True)
        partners = np.full(len(self._true if of_truth else self._called), -1)
        shared = np.zeros_like(partners)
        partners[numbers], shared[numbers] = other[order][first], self._shared[order][first]
        return partners, shared

    def weighted(self, of_truth: bool, diagonal_um: float) -> tuple[float, float, float, float]:
        """Number of objects of one side, and the sums of area, area x Dice and area x H over them."""
        own, other = (self._true, self._called) if of_truth else (self._called, self._true)
        partners, shared = self.partners(of_truth)
        areas = own.pixels * own.mpp.area_um2
        dice = np.zeros(len(own))
        met = partners >= 0
        dice[met] = 2 * shared[met] / (own.pixels[met] + other.pixels[partners[met]])
        distances = [
            self._hausdorff(*((number, partner) if of_truth else (partner, number)))
            if partner >= 0
            else self._nearest(number, of_truth, diagonal_um)
            for number, partner in enumerate(partners.tolist())
        ]
        return len(own), float(areas.sum()), float(areas @ dice), float(areas @ np.array(distances, np.float64))

    def _hausdorff(self, i: int, j: int) -> float:
        """H(G_i, S_j) in um."""
        if (i, j) not in self._distances:
            there, back = self._true.farthest(i, self._called, j), self._called.farthest(j, self._true, i)
            self._distances[i, j] = max(there, back)
        return self._distances[i, j]

    def _nearest(self, number: int, of_truth: bool, diagonal_um: float) -> float:
        """The smallest H to an object of the other side; the edges of two objects' boxes are never farther apart than H."""
        own, other = (self._true, self._called) if of_truth else (self._called, self._true)
        least = np.abs(other.edges_um - own.edges_um[number]).max(axis=1)
        best = diagonal_um if not len(other) else np.inf
        for candidate in np.argsort(least).tolist():
            if least[candidate] >= best:
                break
            best = min(best, self._hausdorff(*((number, candidate) if of_truth else (candidate, number))))
        return float(best)


def _common(one: Box, other: Box) -> Box:
    """The box that two boxes share; empty where there is none."""
    starts = [max(a.start, b.start) for a, b in zip(one, other, strict=True)]
    stops = [min(a.stop, b.stop) for a, b in zip(one, other, strict=True)]
    rows, columns = (slice(start, max(start, stop)) for start, stop in zip(starts, stops, strict=True))
    return rows, columns

"""Lesion FROC as in CAMELYON16: how many lesions are found, for how many false alarms a slide.

At about 8 um/px, as in the challenge:

- A lesion is a connected part of what lies within 37.5 um of the class in the truth, holes filled: lesions less than 75 um
  apart are one. One whose major axis is below 275 um (isolated tumour cells: 200 um before it grew) is neither to be found
  nor false.
- A detection is a connected region of the class in the prediction, by sides and corners, with its largest probability, and
  stands where that is reached (where several pixels do, at the one deepest inside the region).
- A detection in a lesion finds it; one in no lesion is a false positive. The best one in a lesion counts.

    sensitivity(f)   lesions found / lesions, at the threshold that leaves f false positives a slide; linear in between
    FROC score       the mean of sensitivity(f) over f = 1/4, 1/2, 1, 2, 4, 8

At that scale a region of less than some 150 um2 (2.3 pixels of 8 um) is there or not by how it lies on the pixels: of round
ones of 81 um2 a quarter is, of 113 um2 six in ten, of 149 um2 all. So small false alarms are forgiven that `regions.geojson`
has; with `segmentation.min_region_um2` at 200 or more they are in neither.

False positives have a meaning only where all is known: slides of which some examined part is not known are left out. Lesions
below the probability at which the class wins are not detected at any threshold, as there is no region.

Reference: Ehteshami Bejnordi et al. 2017, JAMA 318:2199, doi:10.1001/jama.2017.14585, and the challenge's evaluation code,
from which MONAI's `monai.metrics.froc`, used here, is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import regionprops

from pipeline.bootstrap import Counts, Floats
from pipeline.geometry import Mpp

Mask = npt.NDArray[np.bool_]

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a slide at which sensitivities are averaged."""

FROC_MPP = 8.0
"""Micrometres per pixel at which lesions are looked at, at most."""

_GROWTH_UM, _ISOLATED_UM = 37.5, 275.0
_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Detections:
    """What was found on some slides: probabilities of false positives, and of each lesion, 0 where it was missed."""

    false: tuple[float, ...]
    lesions: tuple[float, ...]
    slides: int

    @classmethod
    def gathered(cls, parts: Sequence[Detections]) -> Detections:
        """All of some slides."""
        false = tuple(value for part in parts for value in part.false)
        lesions = tuple(value for part in parts for value in part.lesions)
        return cls(false, lesions, sum(part.slides for part in parts))


def detect(truth: Mask, prediction: Mask, probability: npt.NDArray[np.uint8], mpp: Mpp, min_area_um2: float) -> Detections:
    """The detections of one class on one slide, all of which is known.

    All arrays are (rows, columns): where the class is, where it was predicted, and 255 times its probability. Predicted
    regions smaller than `min_area_um2` are left out.
    """
    from monai.metrics.froc import compute_fp_tp_probs_nd

    lesions, isolated = _lesions(truth, mpp)
    found, places = _peaks(prediction, probability, mpp, min_area_um2)
    false, hits, _ = compute_fp_tp_probs_nd(found, places, lesions, isolated)
    levels = [float(hit) for number, hit in enumerate(hits, start=1) if number not in isolated]
    return Detections(tuple(level / 255 for level in false.tolist()), tuple(level / 255 for level in levels), 1)


def sensitivities(patients: Sequence[Detections], draws: Counts) -> Floats:
    """Sensitivity of each round at each of RATES, (S, 6); NaN where no lesion was drawn.

    `draws` is (S, P), how often each of P patients counts. How many detections reach a threshold adds up over patients, so
    that all rounds are pooled in one product of matrices.
    """
    values = {value for patient in patients for value in (*patient.false, *patient.lesions)}
    thresholds = np.array([np.inf, *sorted(values - {0.0}, reverse=True)])  # at most 256; what was missed reaches none
    false = draws @ np.stack([_reaching(patient.false, thresholds) for patient in patients])
    found = draws @ np.stack([_reaching(patient.lesions, thresholds) for patient in patients])
    lesions = draws @ np.array([len(patient.lesions) for patient in patients])
    slides = draws @ np.array([patient.slides for patient in patients])
    rounds = np.full((len(draws), len(RATES)), np.nan)
    for number in np.flatnonzero(lesions):
        rounds[number] = np.interp(RATES, false[number] / slides[number], found[number] / lesions[number])
    return rounds


def resampled_froc(patients: Sequence[Detections], draws: Counts) -> Floats:
    """FROC score of each round, (S,), the mean of its `sensitivities`: NaN where no lesion was drawn."""
    return np.asarray(sensitivities(patients, draws).mean(axis=1))


def _reaching(values: Sequence[float], thresholds: Floats) -> Counts:
    """How many values are no lower than each threshold, (T,)."""
    return np.asarray(len(values) - np.searchsorted(np.sort(values), thresholds))


def _lesions(truth: Mask, mpp: Mpp) -> tuple[npt.NDArray[np.int32], list[int]]:
    """(rows, columns) numbers of lesions from 1, 0 outside; and the numbers of those too small to count."""
    if not truth.any():
        return np.zeros(truth.shape, np.int32), []
    near = ndimage.distance_transform_edt(~truth, sampling=(mpp.y, mpp.x)) < _GROWTH_UM
    numbers, _ = ndimage.label(ndimage.binary_fill_holes(near), _EIGHT, output=np.int32)
    regions = regionprops(numbers, spacing=(mpp.y, mpp.x))
    return numbers, [int(region.label) for region in regions if region.axis_major_length < _ISOLATED_UM]


def _peaks(
    prediction: Mask, probability: npt.NDArray[np.uint8], mpp: Mpp, min_area_um2: float
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """255 times the probability (n,), and row and column (n, 2), of each predicted region's highest point."""
    numbers, count = ndimage.label(prediction, _EIGHT, output=np.int32)
    areas = np.bincount(numbers.ravel(), minlength=count + 1)[1:] * mpp.area_um2
    kept = np.flatnonzero(areas >= min_area_um2) + 1
    if not len(kept):
        return np.empty(0), np.empty((0, 2), np.int64)
    depth = ndimage.distance_transform_edt(np.pad(prediction, 1), sampling=(mpp.y, mpp.x))[1:-1, 1:-1]
    height = probability + (depth / (depth.max() + 1)).astype(np.float32)
    places = np.array(ndimage.maximum_position(height, numbers, kept), np.int64)
    return probability[tuple(places.T)].astype(np.float64), places

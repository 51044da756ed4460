"""How well a prediction agrees with the truth: counts of pixels, overlap scores, intervals over patients.

Everything starts from one table of counts, the confusion: rows are the truth, columns the prediction, and one
more column for pixels whose truth is known but which were never examined (glass left out, a tile that failed).

                    predicted as
                    rest  gland  not examined
    truth  rest   [  90      4        20     ]
           gland  [   5     70         3     ]

A pixel not examined is an answer too. Where one class stands for the background (`rest`), it counts as predicted
as that class: right on background, a miss elsewhere. Without such a class it is a miss wherever it lies.
Confusions of parts of a slide, or of several slides, add up; scores do not, so they are computed last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.bootstrap import ENOUGH, Counts, Floats, bounds_by_class, draw_patients
from pipeline.classes import IGNORED, Classes
from pipeline.errors import CohortError
from pipeline.geometry import Mpp

Labels = npt.NDArray[np.uint8]
Report = dict[str, dict[str, dict[str, dict[str, float | int | None]]]]

POOLED = "pooled"
"""The entry of a report that sums all slides of a split; no slide may be called so."""

SCORES = ("dice", "iou", "precision", "recall")
"""The overlap scores, in the order in which a report lists them."""

_BLOCK = 1 << 22  # pixels counted at a time: bincount makes an int64 copy of its input


@dataclass(frozen=True, eq=False)
class SlideConfusion:
    """What was counted on one slide: `confusion` is (C, C + 1) int64, see the top of this module.

    `truth` tells the truth that it was held against from others, at the same scale; empty where nobody has noted it.
    """

    slide_id: str
    patient: str
    split: str
    confusion: Counts
    truth: str = ""


def confusion(truth: Labels, prediction: Labels, classes: int) -> Counts:
    """Counts pixels by true and predicted class.

    `truth` and `prediction` are (H, W) uint8 class indices below `classes`, or IGNORED: an unknown truth counts
    for nothing, a prediction not examined counts in the last column. Returns (classes, classes + 1) int64.
    Raises ValueError where the shapes differ or a known pixel holds a value that is no class.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}: they must be one lattice")
    joint = np.zeros(1 << 16, np.int64)
    rows = max(1, _BLOCK // max(1, truth.shape[-1]))
    for top in range(0, truth.shape[0], rows):
        pairs = (truth[top : top + rows].astype(np.uint16) << 8) | prediction[top : top + rows]
        joint += np.bincount(pairs.ravel(), minlength=1 << 16)
    known = joint.reshape(256, 256)[:IGNORED]
    counts = np.concatenate([known[:classes, :classes], known[:classes, IGNORED:]], axis=1)
    if counts.sum() != known.sum():
        raise ValueError(f"expected class indices below {classes} or {IGNORED}, found {_strays(known, classes)}")
    return counts


def _strays(known: Counts, classes: int) -> list[int]:
    """The values of known pixels that are no class: `known` is (255, 256), truth by prediction."""
    truths, predictions = np.nonzero(known)
    return sorted({int(v) for v in (*truths, *predictions) if classes <= v < IGNORED})


def ratios(counts: Counts, rest: int | None = None) -> dict[str, Floats]:
    """The overlap scores of every class, by name.

    `counts` is (..., C, C + 1); each score is (..., C) float64 from 0 to 1, NaN where its divisor is 0. With TP, FP
    and FN the pixels rightly given to a class, wrongly given to it, and wrongly denied:

        dice       2 TP / (2 TP + FP + FN)      Dice 1945, Ecology 26:297, doi:10.2307/1932409 (the F1 score)
        iou          TP / (TP + FP + FN)        Jaccard 1912, New Phytologist 11:37 (dice / (2 - dice))
        precision    TP / (TP + FP)             of what was called so, how much is
        recall       TP / (TP + FN)             of what is, how much was found

    Dice and IoU are NaN when a class is in neither truth nor prediction, precision when it was never predicted,
    recall when it is not in the truth. `rest` is the class as which pixels not examined count, if there is one.
    """
    return _divide(_extents(counts, rest))


def _extents(counts: Counts, rest: int | None) -> Counts:
    """(..., 3, C): pixels rightly given to each class, given to it, and truly its own; like counts, they add up."""
    square, true = counts[..., :-1].copy(), counts.sum(-1)
    if rest is not None:
        square[..., rest] += counts[..., -1]
    return np.stack([np.diagonal(square, axis1=-2, axis2=-1), square.sum(-2), true], axis=-2)


def _divide(extents: Counts) -> dict[str, Floats]:
    """The scores of (..., 3, C) extents, each (..., C)."""
    right, called, true = (extents[..., row, :].astype(np.float64) for row in range(3))
    with np.errstate(invalid="ignore"):
        return {
            "dice": 2 * right / (called + true),
            "iou": right / (called + true - right),
            "precision": right / called,
            "recall": right / true,
        }


def interval(patients: Counts, rest: int | None = None, samples: int = 1000, seed: int = 0) -> dict[str, Floats]:
    """95 % bootstrap intervals of the pooled scores, by name.

    `patients` is (P, C, C + 1): one confusion a patient, all of the patient's slides summed, because pixels and
    slides of one patient resemble each other and only patients are independent draws. Each of `samples` rounds draws
    P patients with replacement, pools their counts and computes the scores; the bounds are percentiles over the rounds in
    which the score exists and a patient is drawn whose truth has the class, farther out the fewer such patients there are.
    That is so of precision too, which exists where a class was invented alone: only who has it can have any of it right.
    Returns (2, C) float64 for each score, low then high.

    One patient says nothing about the next: where the truth of fewer than two has the class, the bounds are NaN. Fewer than
    six are too few for 95 %: the interval of two holds what is true of all patients every other time. How often more do, and
    references: see bootstrap.py.
    """
    draws = draw_patients(len(patients), samples, seed)
    extents = _extents(patients, rest)
    rounds, alone = _divide(np.tensordot(draws, extents, axes=1)), _divide(extents)
    having = patients.sum(axis=-1) > 0
    return {name: bounds_by_class(values, alone[name], draws, having) for name, values in rounds.items()}


def report(
    rows: Sequence[SlideConfusion],
    classes: Classes,
    mpp: Mpp,
    rest: int | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Report:
    """Scores as `metrics.json` holds them: split -> slide id or "pooled" -> class name -> figure -> value.

    The figures are SCORES, each with the `_low` and `_high` of its 95 % interval over patients (see `interval`; of fewer
    than six it is less sure), the class's extent in the truth, `pixels` and `area_mm2`, and of how many `patients` the truth
    has it: on these its intervals rest. None where there is nothing to divide by, and for bounds of a single patient.
    Pooled scores come from the summed counts of a split's slides, with their intervals over patients; a single slide
    has no interval. `mpp` is the scale at which pixels were counted. Every value is a number or None: valid JSON.
    Raises CohortError where a slide is called "pooled" or occurs twice in a split.
    """
    scores: Report = {}
    for split in dict.fromkeys(row.split for row in rows):
        mine = [row for row in rows if row.split == split]
        part = scores[split] = {POOLED: _named(np.stack([*by_patient(mine).values()]), classes, mpp, rest, samples, seed)}
        for row in mine:
            if row.slide_id in part:
                expected = f"slide ids that differ, none of them {POOLED!r}"
                raise CohortError(row.slide_id, f"a second entry in split {split}", expected, "Change its slide_id.")
            part[row.slide_id] = _named(row.confusion[None], classes, mpp, rest, samples, seed)
    return scores


def by_patient(rows: Sequence[SlideConfusion]) -> dict[str, Counts]:
    """The slides' confusions, summed for each patient."""
    sums: dict[str, Counts] = {}
    for row in rows:
        sums[row.patient] = sums.get(row.patient, np.int64(0)) + row.confusion
    return sums


def _named(
    patients: Counts, classes: Classes, mpp: Mpp, rest: int | None, samples: int, seed: int
) -> dict[str, dict[str, float | int | None]]:
    """The scores of (P, C, C + 1) confusions pooled, by class name, as a report holds them."""
    pooled = patients.sum(axis=0)
    values, limits = ratios(pooled, rest), interval(patients, rest, samples, seed)
    having = (patients.sum(axis=-1) > 0).sum(axis=0)
    named = {}
    for index, name in enumerate(classes.names):
        fields: dict[str, float | int | None] = {}
        for score in SCORES:
            fields[score] = number(values[score][index])
            fields[f"{score}_low"], fields[f"{score}_high"] = (number(limit[index]) for limit in limits[score])
        pixels = int(pooled[index].sum())
        extent = {"pixels": pixels, "area_mm2": pixels * mpp.area_um2 / 1e6, "patients": int(having[index])}
        named[name] = {**fields, **extent}
    return named


def few_patients(scores: Report) -> list[str]:
    """A line for each split with classes, or lesions, of which so few patients tell that no interval is 95 % sure.

    An interval from the least of n to the largest misses what is true wherever all n lie to one side of it.
    """
    told = []
    for split, slides in scores.items():
        counts = {name: int(fields["patients"] or 0) for name, fields in slides[POOLED].items()}
        counts |= {f"lesions of {name}": int(fields.get("froc_patients") or 0) for name, fields in slides[POOLED].items()}
        few = [f"{name} ({n}: {100 * (1 - 2 ** (1 - n)):.0f} % at best)" for name, n in counts.items() if 1 < n < ENOUGH]
        if few:
            told.append(f"{split}: intervals over too few patients for 95 %, which takes {ENOUGH}: {', '.join(few)}")
    return told


def number(value: float) -> float | None:
    """The value, or None for NaN, for which JSON has no word."""
    return None if np.isnan(value) else float(value)


def table(scores: Report) -> list[dict[str, str | float | int | None]]:
    """A report as flat rows for `metrics.csv`: split, slide, class, then the figures of `report`."""
    return [
        {"split": split, "slide": slide, "class": name, **fields}
        for split, slides in scores.items()
        for slide, named in slides.items()
        for name, fields in named.items()
    ]

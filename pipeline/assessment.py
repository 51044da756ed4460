"""All that is counted on one slide, and what the counts of many slides say of objects, boundaries, lesions and calibration.

A slide's truth and canvas are read block by block (pixels, calibration), then field by field (objects, boundaries), then
once at a coarse level (lesions), so that memory is bounded. Whatever is counted adds up over slides: scores are those of
a whole split, with intervals over its patients, as metrics.py has them for pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.bootstrap import Counts, Floats, bounds, bounds_by_class, draw_patients
from pipeline.boundaries import Boundaries, hd95, measure_boundaries, surface_dice
from pipeline.calibration import BINS, apart, calibration_error, count_reliability
from pipeline.canvas import Canvas
from pipeline.classes import IGNORED, Classes
from pipeline.fields import Field, KnownMap
from pipeline.froc import FROC_MPP, Detections, detect, resampled_froc
from pipeline.geometry import Mpp, Roi
from pipeline.metrics import POOLED, Report, SlideConfusion, confusion, number
from pipeline.objects import (
    CALLED_COUNT,
    MATCHED,
    OBJECT_SCORES,
    OBJECT_SUMS,
    TRUE_COUNT,
    delivered,
    object_scores,
    object_sums,
)
from pipeline.truth import Truth

BLOCK = 2048
"""Side of what is compared at once, in pixels."""

SHAPE_SCORES = (*OBJECT_SCORES, "hd95_um", "nsd", "froc", "ece")
"""Scores that a report gains from assessments; each has an interval, `_low` and `_high`."""


@dataclass(frozen=True)
class Rules:
    """How a slide is assessed: the class of everything else, the least object found, the tolerance, classes with lesions.

    A boundary may be off by `tolerance_um`; None: by two pixels. Of a field that is looked at from a coarser level it may be
    off by two pixels of that in any case: coarse truth and coarse labels differ by so much where the fine ones are the same.
    """

    rest: int | None
    min_area_um2: float
    tolerance_um: float | None = None
    lesions: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Assessment:
    """What was counted on one slide, of C classes.

    `confusion` is (C, C + 1) as in metrics.py, `truth` a digest of what it was held against, pixel by pixel, `reliability`
    (C, 15, 3) as in calibration.py, `objects` (C, 9) as in objects.py. `boundaries` and `detections` have one item a class;
    the latter is None where lesions are not asked for or cannot be told. `coarsest_um` is the largest um/px at which a field
    was read, `tolerance_um` the farthest that a boundary could be off and still be right.
    """

    confusion: Counts
    truth: str
    reliability: Counts
    objects: Floats
    boundaries: tuple[Boundaries, ...]
    detections: tuple[Detections | None, ...]
    coarsest_um: float
    tolerance_um: float


@dataclass(frozen=True, eq=False)
class SlideAssessment:
    """An assessment and whose it is; `network` tells which of several examined the slide, as in a cross-validation."""

    slide_id: str
    patient: str
    split: str
    found: Assessment
    network: str = ""

    @property
    def pixels(self) -> SlideConfusion:
        """Its pixels, as metrics.report takes them."""
        return SlideConfusion(self.slide_id, self.patient, self.split, self.found.confusion, self.found.truth)


def assess(canvas: Canvas, truth: Truth, rules: Rules) -> Assessment:
    """Hold a segmented slide against its truth, wherever that is known."""
    classes = len(canvas.classes)
    pixels, reliability = np.zeros((classes, classes + 1), np.int64), np.zeros((classes, BINS, 3), np.int64)
    known, digest = KnownMap(canvas), hashlib.sha256()
    for roi, true, labels in _known_blocks(canvas, truth):
        digest.update(f"{roi.x}, {roi.y}: ".encode())
        digest.update(true.tobytes())
        pixels += confusion(true, labels, classes)
        reliability += count_reliability(true, labels, canvas.read_probabilities(roi))
        known.add(roi, true != IGNORED)
    objects, boundaries, coarsest = np.zeros((classes, OBJECT_SUMS)), [[_NONE] for _ in range(classes)], 0.0
    largest = _tolerance_um(rules, canvas.lattice.mpp, canvas.lattice.mpp)
    for field in known.fields(truth):
        tolerance = _tolerance_um(rules, field.mpp, canvas.lattice.mpp)
        coarsest, largest = max(coarsest, field.mpp.x, field.mpp.y), max(largest, tolerance)
        for index in _present(field, rules.rest):
            sums, lines = _shapes(field, index, rules, tolerance)
            objects[index] += sums
            boundaries[index].append(lines)
    gathered = tuple(Boundaries.gathered(parts) for parts in boundaries)
    detections = _detections(canvas, truth, rules)
    return Assessment(pixels, digest.hexdigest(), reliability, objects, gathered, detections, coarsest, largest)


def count_pixels(canvas: Canvas, truth: Truth) -> Counts:
    """The confusion of a segmented slide alone, (C, C + 1) int64 as in metrics.py, wherever the truth is known."""
    classes = len(canvas.classes)
    none = np.zeros((classes, classes + 1), np.int64)
    return sum((confusion(true, labels, classes) for _, true, labels in _known_blocks(canvas, truth)), none)


def _known_blocks(canvas: Canvas, truth: Truth) -> Iterator[tuple[Roi, np.ndarray, np.ndarray]]:
    """Blocks of which something is known, with their true and their predicted class indices."""
    for y in range(0, canvas.lattice.height, BLOCK):
        for x in range(0, canvas.lattice.width, BLOCK):
            roi = Roi(x, y, BLOCK, BLOCK).intersect(canvas.lattice.roi)
            true = truth.read(roi, canvas.lattice)
            if (true != IGNORED).any():
                yield roi, true, canvas.read_labels(roi)


def extended(
    scores: Report, rows: Sequence[SlideAssessment], classes: Classes, rest: int | None, samples: int = 1000, seed: int = 0
) -> Report:
    """A report of the same slides with the scores of objects, boundaries, lesions and calibration in each of its entries.

    Adds SHAPE_SCORES with their intervals (`rest`, the background, has only `ece`), how many objects there are, were
    predicted and were matched, how many lesions on how many slides (`froc_slides`: those that are known throughout) of how
    many patients who have any (`froc_patients`, on whom the interval of `froc` rests; all others do on the patients whose
    truth has the class), and `shape_um`, the coarsest um/px at which shapes were looked at, and `tolerance_um`, how far a
    boundary could be off and still be right: the `nsd` of two runs tells which is better only where both had the same.
    """
    gained: Report = {}
    for split, slides in scores.items():
        mine = [row for row in rows if row.split == split]
        gained[split] = {}
        for slide, named in slides.items():
            part = mine if slide == POOLED else [row for row in mine if row.slide_id == slide]
            columns = _columns(part, rest, samples, seed)
            gained[split][slide] = {
                name: {**fields, **{key: _plain(key, values[classes.index(name)]) for key, values in columns.items()}}
                for name, fields in named.items()
            }
    return gained


def overall_error(rows: Sequence[SlideAssessment], samples: int, seed: int) -> dict[str, float | None]:
    """ECE over all classes, `ece`, `ece_low`, `ece_high`; of several networks the mean of their own, by pixels."""
    reliability = np.stack([part.reliability.sum(axis=0) for part in _by_patient(rows)])
    draws = draw_patients(len(reliability), samples, seed)
    rounds = calibration_error(np.tensordot(draws, reliability, axes=1))
    low, high = bounds(rounds, calibration_error(reliability))
    value = calibration_error(reliability.sum(axis=0))
    return {"ece": number(float(value)), "ece_low": number(low), "ece_high": number(high)}


_NONE = Boundaries.gathered([])
_COUNTS = ("objects", "objects_predicted", "objects_matched", "lesions", "froc_slides", "froc_patients")


def _present(field: Field, rest: int | None) -> list[int]:
    """The classes, but `rest`, that a field holds in truth or prediction."""
    found = np.union1d(field.truth, field.prediction).tolist()
    return [index for index in found if index not in (rest, IGNORED)]


def _tolerance_um(rules: Rules, mpp: Mpp, finest: Mpp) -> float:
    two_pixels = 2 * max(mpp.x, mpp.y)
    if rules.tolerance_um is None:
        return two_pixels
    return rules.tolerance_um if mpp == finest else max(rules.tolerance_um, two_pixels)


def _shapes(field: Field, index: int, rules: Rules, tolerance_um: float) -> tuple[Floats, Boundaries]:
    known = field.truth != IGNORED
    true, called = field.truth == index, (field.prediction == index) & known
    sums = object_sums(true, delivered(called, field.edge, field.mpp, rules.min_area_um2), field.mpp)
    return sums, measure_boundaries(true, called, known, field.mpp, tolerance_um)


def _detections(canvas: Canvas, truth: Truth, rules: Rules) -> tuple[Detections | None, ...]:
    """For each class what was detected; None where it has no lesions, or where something examined is not known."""
    if not rules.lesions:
        return (None,) * len(canvas.classes)
    level = max((index for index, item in enumerate(canvas.levels) if item.mpp.x <= FROC_MPP), default=0)
    lattice = canvas.levels[level]
    true, labels = truth.read(lattice.roi, lattice), canvas.read_labels(lattice.roi, level)
    inside = (slice(lattice.height - 1), slice(lattice.width - 1))  # the last pixels may reach past the slide
    if ((true == IGNORED) & (labels != IGNORED))[inside].any():
        return (None,) * len(canvas.classes)
    probabilities = canvas.read_probabilities(lattice.roi, level)
    return tuple(
        detect(true == index, labels == index, probabilities[index], lattice.mpp, rules.min_area_um2)
        if index in rules.lesions
        else None
        for index in range(len(canvas.classes))
    )


def _by_patient(rows: Sequence[SlideAssessment]) -> list[Assessment]:
    """The slides' assessments, summed for each patient; `reliability` has the bins of each network by themselves."""
    patients: dict[str, list[Assessment]] = {}
    networks = sorted({row.network for row in rows})
    for row in rows:
        own = apart(row.found.reliability, networks.index(row.network), len(networks))
        patients.setdefault(row.patient, []).append(replace(row.found, reliability=own))
    return [_sum(parts) for parts in patients.values()]


def _sum(parts: Sequence[Assessment]) -> Assessment:
    detections = [
        [one for one in ones if one is not None] for ones in zip(*(part.detections for part in parts), strict=True)
    ]
    return Assessment(
        np.sum([part.confusion for part in parts], axis=0),
        "",
        np.sum([part.reliability for part in parts], axis=0),
        np.sum([part.objects for part in parts], axis=0),
        tuple(Boundaries.gathered(ones) for ones in zip(*(part.boundaries for part in parts), strict=True)),
        tuple(Detections.gathered(ones) if ones else None for ones in detections),
        max(part.coarsest_um for part in parts),
        max(part.tolerance_um for part in parts),
    )


def _columns(rows: Sequence[SlideAssessment], rest: int | None, samples: int, seed: int) -> Mapping[str, Floats]:
    """What `extended` adds, each (C,): scores of some slides pooled, their bounds, and counts; NaN where there is none."""
    patients = _by_patient(rows)
    once, draws = np.ones((1, len(patients)), np.int64), draw_patients(len(patients), samples, seed)
    pooled, rounds, alone = (_scores(patients, some) for some in (once, draws, np.eye(len(patients), dtype=np.int64)))
    whole, having = _sum(patients), np.stack([patient.confusion.any(axis=1) for patient in patients])
    columns: dict[str, Floats] = {}
    for name in SHAPE_SCORES:
        columns[name] = pooled[name][0]
        columns[f"{name}_low"], columns[f"{name}_high"] = bounds_by_class(rounds[name], alone[name], draws, having)
    counts = whole.objects[:, [TRUE_COUNT, CALLED_COUNT, MATCHED]].T
    columns |= dict(zip(_COUNTS, (*counts, *_searched(patients, whole)), strict=True))
    columns["shape_um"] = np.full(len(whole.objects), whole.coarsest_um)
    columns["tolerance_um"] = np.full(len(whole.objects), whole.tolerance_um)
    if rest is not None:
        for name in columns.keys() - {"ece", "ece_low", "ece_high"}:
            columns[name] = np.where(np.arange(len(whole.objects)) == rest, np.nan, columns[name])
    return columns


def _searched(patients: Sequence[Assessment], whole: Assessment) -> Floats:
    """Of each class the lesions, the slides on which they were looked for, and the patients who have some, (3, C)."""
    having = np.sum([[bool(one and one.lesions) for one in patient.detections] for patient in patients], axis=0)
    counts = [(np.nan, np.nan) if found is None else (len(found.lesions), found.slides) for found in whole.detections]
    lesions, slides = np.array(counts, np.float64).T
    return np.stack([lesions, slides, np.where(np.isnan(slides), np.nan, having)])


def _scores(patients: Sequence[Assessment], draws: Counts) -> dict[str, Floats]:
    """SHAPE_SCORES of each round, each (S, C)."""
    classes = range(len(patients[0].boundaries))
    lines = [[patient.boundaries[index] for patient in patients] for index in classes]
    return {
        **object_scores(np.tensordot(draws.astype(np.float64), np.stack([one.objects for one in patients]), axes=1)),
        "hd95_um": np.stack([hd95(part, draws) for part in lines], axis=1),
        "nsd": np.stack([surface_dice(part, draws) for part in lines], axis=1),
        "froc": np.stack([_froc([patient.detections[index] for patient in patients], draws) for index in classes], axis=1),
        "ece": calibration_error(np.tensordot(draws, np.stack([patient.reliability for patient in patients]), axes=1)),
    }


def _froc(patients: Sequence[Detections | None], draws: Counts) -> Floats:
    """FROC of each round, (S,); NaN for a class without lesions. A patient without detections (None) adds nothing."""
    if all(patient is None for patient in patients):
        return np.full(len(draws), np.nan)
    return resampled_froc([patient or Detections((), (), 0) for patient in patients], draws)


def _plain(column: str, value: float) -> float | int | None:
    """A value as JSON has it: None for NaN, and counts without a fraction."""
    plain = number(value)
    return int(plain) if column in _COUNTS and plain is not None else plain

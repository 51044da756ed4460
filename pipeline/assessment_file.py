"""What was counted on slides, kept so that it need not be counted again.

OUTPUT/assessments.json   reliability, objects, boundaries and detections of each slide of confusions.json (see tally.py), so
                          that runs can be pooled without their slides
OUTPUT/slides/SLIDE_ID/assessment.json   the same of one slide with its pixels, and all that it was made from
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.assessment import Assessment, SlideAssessment
from pipeline.bootstrap import Counts
from pipeline.boundaries import Boundaries, Spread
from pipeline.errors import CohortError, unread
from pipeline.files import write_text
from pipeline.froc import Detections
from pipeline.metrics import SlideConfusion

FILE = "assessments.json"


def write_assessments(path: Path, rows: Sequence[SlideAssessment]) -> None:
    """Write all but the pixels of some slides as JSON, exactly; the file appears when it is complete."""
    slides = {row.slide_id: asdict(row.found) for row in rows}
    for facts in slides.values():
        del facts["confusion"], facts["truth"]
    write_text(path, json.dumps({"slides": slides}, default=np.ndarray.tolist) + "\n")


def read_assessments(path: Path, counted: Sequence[SlideConfusion]) -> list[SlideAssessment]:
    """What `write_assessments` wrote of the slides whose pixels were `counted`, in their order.

    Raises CohortError where there is no such file, it is damaged, or it lacks one of them.
    """
    try:
        slides = json.loads(path.read_text(encoding="utf-8"))["slides"]
        return [
            SlideAssessment(
                row.slide_id, row.patient, row.split, _assessment(row.confusion, row.truth, slides[row.slide_id])
            )
            for row in counted
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = "Call `fullfield evaluate` with the run's configuration, which writes it."
        raise CohortError(str(path), unread(error), "what was counted on these slides", remedy) from error


def write_assessment(path: Path, found: Assessment, made_from: Mapping[str, str]) -> None:
    """Write what was counted on one slide as JSON, exactly, and all that it depends on; whole or not at all."""
    content = {"made_from": dict(made_from), **asdict(found)}
    write_text(path, json.dumps(content, default=np.ndarray.tolist) + "\n")


def read_assessment(path: Path, made_from: Mapping[str, str]) -> Assessment | None:
    """What `write_assessment` wrote; None where that was made from anything else, is damaged, or is not there."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["made_from"] != dict(made_from):
            return None
        return _assessment(np.array(facts["confusion"], np.int64), str(facts["truth"]), facts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _assessment(confusion: Counts, truth: str, facts: Mapping[str, Any]) -> Assessment:
    return Assessment(
        confusion,
        truth,
        np.array(facts["reliability"], np.int64),
        np.array(facts["objects"], np.float64),
        tuple(_boundaries(part) for part in facts["boundaries"]),
        tuple(None if part is None else _detections(part) for part in facts["detections"]),
        float(facts["coarsest_um"]),
        float(facts["tolerance_um"]),
    )


def _boundaries(facts: Mapping[str, Any]) -> Boundaries:
    there, back = (
        Spread(*(np.array(facts[side][key], np.float64) for key in ("um", "length")))
        for side in ("from_truth", "from_prediction")
    )
    return Boundaries(there, back, float(facts["within"]))


def _detections(facts: Mapping[str, Any]) -> Detections:
    return Detections(tuple(facts["false"]), tuple(facts["lesions"]), int(facts["slides"]))

"""The counts that a run's scores rest on, kept beside them, so that runs can be pooled and compared without their slides.

OUTPUT/confusions.json   classes, scale, background, and one confusion a slide, with its patient and split
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import CohortError
from pipeline.files import write_text
from pipeline.metrics import SlideConfusion, number, ratios

FILE = "confusions.json"


@dataclass(frozen=True)
class Tally:
    """What was counted on the slides of a run: class names, index of the background (None without one), um/px, slides."""

    classes: tuple[str, ...]
    rest: int | None
    mpp: float
    rows: tuple[SlideConfusion, ...]

    def dice(self, name: str) -> dict[str, float]:
        """Dice of a class for each patient, slides summed; left out where neither side has the class."""
        sums: dict[str, np.ndarray] = {}
        for row in self.rows:
            sums[row.patient] = sums.get(row.patient, np.int64(0)) + row.confusion
        found = {
            patient: number(ratios(counts, self.rest)["dice"][self.classes.index(name)]) for patient, counts in sums.items()
        }
        return {patient: dice for patient, dice in found.items() if dice is not None}


def write_tally(path: Path, tally: Tally) -> None:
    """Write a tally as JSON; the file appears when it is complete."""
    slides = {
        row.slide_id: {"patient": row.patient, "split": row.split, "confusion": row.confusion.tolist()} for row in tally.rows
    }
    content = {"classes": tally.classes, "rest": tally.rest, "mpp": tally.mpp, "slides": slides}
    write_text(path, json.dumps(content) + "\n")


def read_tally(path: Path) -> Tally:
    """Read what `write_tally` wrote. Raises CohortError where there is no such file or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_row(slide_id, slide) for slide_id, slide in content["slides"].items())
        return Tally(tuple(content["classes"]), content["rest"], float(content["mpp"]), rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = "Run `fullfield evaluate` (or `fullfield run`) with that run's configuration."
        raise CohortError(str(path), str(error), "the counts of an evaluated run", remedy) from error


def _row(slide_id: str, slide: Mapping[str, object]) -> SlideConfusion:
    confusion = np.array(slide["confusion"], np.int64)
    return SlideConfusion(slide_id, str(slide["patient"]), str(slide["split"]), confusion)

"""The counts that a run's scores rest on, kept beside them, so that runs can be pooled and compared without their slides.

OUTPUT/confusions.json   classes, scale, background, and one confusion a slide, with its patient and split
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import CohortError, unread
from pipeline.files import write_text
from pipeline.metrics import SlideConfusion, by_patient, ratios
from pipeline.store import run_file

FILE = "confusions.json"

_AREA_TOLERANCE, _FEW_PIXELS = 0.05, 30  # by how much a class of a slide may differ between two scales


@dataclass(frozen=True)
class Tally:
    """What was counted on the slides of a run: class names, index of the background (None without one), um/px, slides."""

    classes: tuple[str, ...]
    rest: int | None
    mpp: float
    rows: tuple[SlideConfusion, ...]

    def dice(self, name: str) -> dict[str, float]:
        """Dice of a class for each patient whose truth has it, slides summed.

        Of the others it would tell nothing but whether a single pixel was invented: see `invented`.
        """
        index, sums = self.classes.index(name), by_patient(self.rows)
        return {key: float(ratios(sums[key], self.rest)["dice"][index]) for key in sums if sums[key][index].any()}

    def invented(self, name: str) -> dict[str, float]:
        """The area, in mm2, that is called a class, for each patient whose truth has none of it, slides summed."""
        index = self.classes.index(name)
        called = [index, -1] if index == self.rest else [index]  # pixels not examined count as the background
        without = {key: counts for key, counts in by_patient(self.rows).items() if counts.any() and not counts[index].any()}
        return {key: float(counts[:, called].sum() * self.mpp**2 / 1e6) for key, counts in without.items()}

    @property
    def unseen(self) -> Tally:
        """The slides that the network did not learn from: those of any split but train."""
        return replace(self, rows=tuple(row for row in self.rows if row.split != "train"))

    @property
    def held_out(self) -> Tally:
        """The slides of which the network knows nothing: those that it neither learned from nor was chosen by."""
        return replace(self, rows=tuple(row for row in self.rows if row.split not in ("train", "val")))

    @property
    def patients(self) -> frozenset[str]:
        """The patients of its slides."""
        return frozenset(row.patient for row in self.rows)

    @property
    def chosen_by(self) -> frozenset[str]:
        """The patients by whom the network's epoch was chosen."""
        return frozenset(row.patient for row in self.rows if row.split == "val")

    @property
    def slides(self) -> frozenset[str]:
        """The slides, by slide_id."""
        return frozenset(row.slide_id for row in self.rows)

    def of(self, patients: frozenset[str]) -> Tally:
        """The slides of some patients."""
        return replace(self, rows=tuple(row for row in self.rows if row.patient in patients))


def paired_means(first: Tally, second: Tally) -> tuple[dict[str, float], dict[str, float]]:
    """Mean Dice of each patient of both, over the classes that the truth has in both, the background among them.

    So both are scored on the same classes of a patient; what is invented costs the class that it is taken from.
    """
    ours, theirs = by_patient(first.rows), by_patient(second.rows)
    known = {key: ours[key].any(axis=1) & theirs[key].any(axis=1) for key in ours if key in theirs}

    def means(sums: Mapping[str, np.ndarray], rest: int | None) -> dict[str, float]:
        return {key: float(ratios(sums[key], rest)["dice"][has].mean()) for key, has in known.items() if has.any()}

    return means(ours, first.rest), means(theirs, second.rest)


def shared_patients(
    first: Tally, second: Tally, names: tuple[str, str] = ("the first run", "the second run")
) -> frozenset[str]:
    """The patients whose slides were held against the same truth in both, which are called by `names`.

    Raises CohortError where there is none, where the classes differ, where one lacks a slide of a shared patient, or where
    what is known of a slide differs: at the same scale in any pixel, or in the areas of classes where one has noted no more,
    as a promotion does; at two scales where the area of a class differs by more than 5 %, and by more than thirty pixels of
    the coarser one.
    """
    remedy = "Compare runs on the same slides, annotations and classes."
    if (first.classes, first.rest) != (second.classes, second.rest):
        found = f"the classes {', '.join(first.classes)} against {', '.join(second.classes)}, or another background"
        raise CohortError("the runs", found, "the same classes and background", remedy)
    shared = first.patients & second.patients
    if not shared:
        found = f"{_patients(first)} against {_patients(second)}: no patient is shared"
        raise CohortError("the runs", found, "patients that both were examined on", remedy)
    ours, theirs = first.of(shared), second.of(shared)
    for name, one, other in zip(names, (ours, theirs), (theirs, ours), strict=True):
        if missing := sorted(other.slides - one.slides):
            found = f"the shared patients {', '.join(sorted(shared))}, but {name} lacks {', '.join(missing)}"
            remedy = "Where they failed, call `fullfield run` with its configuration again; else compare runs of one cohort."
            raise CohortError("the runs", found, "all slides of them in both", remedy)
    if strangers := _strangers(ours, theirs):
        found = f"the shared patients {', '.join(sorted(shared))}, but another truth for {', '.join(strangers)}"
        raise CohortError("the runs", found, "the same slides of them with the same annotations", remedy)
    return shared


def scale_remark(first: Tally, second: Tally) -> str:
    """What is to be said where two are counted at two scales."""
    return f"each is scored at its own scale, {first.mpp:g} and {second.mpp:g} um/px"


def _patients(tally: Tally) -> str:
    return ", ".join(sorted(tally.patients)) or "nobody"


def _strangers(first: Tally, second: Tally) -> list[str]:
    """The slides whose known truth in one tally is not that in the other; both have all of them."""
    one, two = ({row.slide_id: row for row in tally.rows} for tally in (first, second))
    ours, theirs = first.mpp**2, second.mpp**2
    differing = []
    for slide in one:
        areas = [row.confusion.sum(axis=1) for row in (one[slide], two[slide])]
        if ours == theirs:
            noted = one[slide].truth and two[slide].truth
            same = one[slide].truth == two[slide].truth if noted else bool((areas[0] == areas[1]).all())
        else:
            known, other = areas[0] * ours, areas[1] * theirs
            margin = _AREA_TOLERANCE * np.maximum(known, other) + _FEW_PIXELS * max(ours, theirs)
            same = bool((np.abs(known - other) <= margin).all())
        if not same:
            differing.append(slide)
    return sorted(differing)


def write_tally(path: Path, tally: Tally) -> None:
    """Write a tally as JSON; the file appears when it is complete."""
    slides = {
        row.slide_id: {
            "patient": row.patient,
            "split": row.split,
            "truth": row.truth,
            "confusion": row.confusion.tolist(),
        }
        for row in tally.rows
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
        remedy = "Name the output of a run; `fullfield run`, or `evaluate`, with its configuration writes them."
        raise CohortError(str(path), unread(error), "the counts of an evaluated run", remedy) from error


def find_tally(reference: str) -> Tally:
    """The tally of a run: of an output folder, or of an MLflow run (`runs:/ID` or its bare ID).

    Raises CohortError where a folder holds none, TrackingError where there is no such run or it holds none.
    """
    with run_file(reference, FILE) as path:
        return read_tally(path)


def _row(slide_id: str, slide: Mapping[str, object]) -> SlideConfusion:
    confusion = np.array(slide["confusion"], np.int64)
    return SlideConfusion(slide_id, str(slide["patient"]), str(slide["split"]), confusion, str(slide.get("truth", "")))

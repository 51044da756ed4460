"""Approves a precision below exact for a model of the bench, whatever it changes: its table shows what.

    python -m benchmarks.approval MODEL SLIDE LABELS PRECISION

Calibrates int8 on the slide's texture. LABELS (see labels.py) are one forward pass. Prints how far from exact it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.labels import Labels
from benchmarks.models import patches
from pipeline.approval import Deviation, approve
from pipeline.classes import IGNORED
from pipeline.errors import FullfieldError
from pipeline.geometry import Lattice, Roi
from pipeline.grid import Grid
from pipeline.openvino_graph import quantise
from pipeline.patches import Source
from pipeline.precision import measure_deviation
from pipeline.runtime import EXACT, fp32_graph, int8_folder, is_calibrated, load_engine, open_engine, settled
from pipeline.settings import EngineSettings, Precision, TissueSettings
from pipeline.slide import open_slide
from pipeline.tissue import find_tissue

_HELD, _PATCHES, _PATCH = 1024, 100, 256  # pixels along a side; patches to calibrate on, and pixels along theirs


@dataclass(frozen=True)
class OnePass:
    """The labels of one forward pass as truth, in one square of a slide."""

    base: Lattice
    labels: Labels
    square: Roi
    remarks: tuple[str, ...] = ()

    def known_roi(self) -> Roi:
        """The square."""
        return self.square

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See Truth."""
        truth = np.full(roi.shape, IGNORED, np.uint8)
        common = roi.intersect(self.square)
        truth[common.within(roi).slices()] = self.labels.read(common)
        return truth


def approved(model: Path, slide_path: Path, labels: Path, precision: Precision) -> Deviation:
    """How far a precision is from exact; from now on it is approved. Raises EngineError where it cannot be run here."""
    settings = settled(EngineSettings(precision=precision, max_label_change=1.0))
    if precision == "fastest" and not is_calibrated(model):
        quantise(fp32_graph(model), list(patches(_PATCHES, _PATCH)), int8_folder(model))
    slide = open_slide(slide_path)
    tissue = find_tissue(slide, TissueSettings())
    squares = (tile.write_roi for tile in Grid(slide.base, _HELD, 0, 1))
    square = max(squares, key=lambda square: tissue.fraction(square, slide.base))
    source = Source(slide, OnePass(slide.base, Labels.open(labels), square), slide.base)
    exact = open_engine(model, settled(EXACT))
    slides = {slide_path.name: lambda: (source, tissue)}
    found, _ = measure_deviation(exact, load_engine(model, settings), slides, slide.base.roi.area, seed=0)
    approve(found, settings, model)
    return found


if __name__ == "__main__":
    try:
        print(approved(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))  # type: ignore[arg-type]
    except FullfieldError as error:
        sys.exit(f"{type(error).__name__}: {error}")

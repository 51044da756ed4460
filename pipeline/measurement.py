"""How much of a slide each class takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.canvas import Canvas
from pipeline.files import write_csv
from pipeline.tissue import Tissue

_UM2_PER_MM2 = 1e6


@dataclass(frozen=True)
class Measurement:
    """What one class takes.

    `area_mm2` counts all examined pixels of the class; those that reach past the slide's edge count whole. `tissue_share`,
    0 to 1, is the class's part of the tissue that was examined, so that the shares of all classes sum to 1; 0 for each where
    no tissue was examined.
    """

    class_name: str
    area_mm2: float
    tissue_share: float


def measure(canvas: Canvas, tissue: Tissue) -> tuple[Measurement, ...]:
    """One measurement a class, in the order of the classes; the canvas is read block by block."""
    pixels, on_tissue = np.zeros(len(canvas.classes), np.int64), np.zeros(len(canvas.classes), np.int64)
    for row in canvas.block_rows():
        for roi in row:
            labels, stained = canvas.read_labels(roi), tissue.sampled(roi, canvas.lattice)
            for index in range(len(canvas.classes)):
                found = labels == index
                pixels[index] += np.count_nonzero(found)
                on_tissue[index] += np.count_nonzero(found & stained)
    examined = max(int(on_tissue.sum()), 1)
    pixel_mm2 = canvas.lattice.mpp.area_um2 / _UM2_PER_MM2
    return tuple(
        Measurement(item.name, int(pixels[index]) * pixel_mm2, int(on_tissue[index]) / examined)
        for index, item in enumerate(canvas.classes)
    )


def write_measurements(path: Path, measurements: Sequence[Measurement], regions: Mapping[str, int]) -> None:
    """Write `class, area_mm2, tissue_share, regions` as CSV, a row a class.

    `regions` counts whole ones by class name; a class that it does not name was not outlined, and its cell stays empty.
    """
    rows = [
        {
            "class": item.class_name,
            "area_mm2": round(item.area_mm2, 6),
            "tissue_share": round(item.tissue_share, 6),
            "regions": regions.get(item.class_name),
        }
        for item in measurements
    ]
    write_csv(path, ["class", "area_mm2", "tissue_share", "regions"], rows)

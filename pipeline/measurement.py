"""How much of a slide each class takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.canvas import Canvas
from pipeline.files import write_csv
from pipeline.tissue import Tissue

_UM2_PER_MM2 = 1e6


@dataclass(frozen=True)
class Measurement:
    """What one class takes.

    `area_mm2` counts all examined pixels of the class, and so depends on the size of the tiles, whose glass is among them.
    `tissue_mm2` counts those on tissue, all of which is examined whatever the tiles. Pixels that reach past the slide's edge
    count whole. `tissue_share`, 0 to 1, is the class's part of the tissue, so that the shares of all classes sum to 1; 0 for
    each where no tissue was examined.
    """

    class_name: str
    area_mm2: float
    tissue_mm2: float
    tissue_share: float


def count_pixels(canvas: Canvas, band: int, tissue: Tissue) -> np.ndarray:
    """(2, classes) int64: of a row of tiles, the examined pixels of each class, and those of them that are on tissue."""
    counts = np.zeros((2, len(canvas.classes)), np.int64)
    for roi in chain.from_iterable(canvas.block_rows(band)):
        labels, stained = canvas.read_labels(roi), tissue.sampled(roi, canvas.lattice)
        for index in range(len(canvas.classes)):
            found = labels == index
            counts[:, index] += np.count_nonzero(found), np.count_nonzero(found & stained)
    return counts


def measure(canvas: Canvas, counts: np.ndarray) -> tuple[Measurement, ...]:
    """One measurement a class, in the order of the classes, from the `count_pixels` of all bands together."""
    areas, on_tissue = (counts * (canvas.lattice.mpp.area_um2 / _UM2_PER_MM2)).tolist()
    shares = (counts[1] / max(counts[1].sum(), 1)).tolist()
    rows = zip(canvas.classes.names, areas, on_tissue, shares, strict=True)
    return tuple(Measurement(*row) for row in rows)


def write_measurements(path: Path, measurements: Sequence[Measurement], regions: Mapping[str, int]) -> None:
    """Write `class, area_mm2, tissue_mm2, tissue_share, regions` as CSV, a row a class.

    `regions` counts whole ones by class name; a class that it does not name was not outlined, and its cell stays empty.
    """
    rows = [
        {
            "class": item.class_name,
            "area_mm2": round(item.area_mm2, 6),
            "tissue_mm2": round(item.tissue_mm2, 6),
            "tissue_share": round(item.tissue_share, 6),
            "regions": regions.get(item.class_name),
        }
        for item in measurements
    ]
    write_csv(path, ["class", "area_mm2", "tissue_mm2", "tissue_share", "regions"], rows)

"""Fields: the connected parts of a slide of which the truth is known, each small enough to be held in memory at once.

Scores of objects and of boundaries need more than a pixel at a time. They are computed field by field, and what one field
gives adds up with what others give:

    known area      fields         A field is a connected part of the known area, by sides and corners of cells (a cell is
    .aa....bbb      aa  bbb        1 pixel where the slide has up to 2048 along its longer side, else 2, 4, 8, ...). One of
    .aa......b      aa    b        more than 4096 x 4096 pixels is read from the first coarser level at which it is not.

Pixels outside the known area count for nothing: an object that crosses its border is cut there, in truth and prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import block_reduce

from pipeline.canvas import Canvas
from pipeline.classes import IGNORED
from pipeline.geometry import Mpp, Roi
from pipeline.truth import Truth

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

CELLS = 2048
"""Most cells along a side of the map of what is known; a field has at most (2 x CELLS)^2 pixels."""

_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True, eq=False)
class Field:
    """Truth and prediction of one field, (rows, columns) uint8 class indices; IGNORED in `truth` where nothing is known.

    `edge` (rows, columns) is true where the known ends and the slide does not: at known pixels with a side or a corner
    towards one of the slide that is not known.
    """

    truth: Labels
    prediction: Labels
    edge: Mask
    mpp: Mpp


class KnownMap:
    """Where something is known of a slide, in square cells of a power of two pixels; filled in block by block."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._cell = 1 << max(0, int(np.ceil(np.log2(max(canvas.lattice.shape) / CELLS))))
        self._cells = np.zeros(canvas.lattice.shrink(self._cell).shape, bool)

    def add(self, roi: Roi, known: Mask) -> None:
        """Note what is known of `roi`, (rows, columns) bool; it starts at a multiple of a cell."""
        part = block_reduce(known, self._cell, np.any)
        self._cells[roi.shrink(self._cell).slices()] |= part

    def fields(self, truth: Truth) -> Iterator[Field]:
        """The fields, one at a time."""
        numbers, _ = ndimage.label(self._cells, _EIGHT)
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), start=1):
            box = Roi(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
            yield self._read(box, numbers[rows, columns] == number, truth)

    def _read(self, box: Roi, own: Mask, truth: Truth) -> Field:
        """The field in a box of cells, of which `own` are its own."""
        levels = self._canvas.levels
        pixels = box.area * self._cell**2
        level = next(n for n in range(len(levels)) if pixels <= (2 * CELLS << n) ** 2)
        side = self._cell >> level  # at least 1: a field that needs a coarser level lies in a slide of larger cells
        roi = Roi(box.x * side, box.y * side, box.width * side, box.height * side).intersect(levels[level].roi)
        known = own.repeat(side, axis=0).repeat(side, axis=1)[: roi.height, : roi.width]
        labels = np.where(known, truth.read(roi, levels[level]), np.uint8(IGNORED))
        edge = _edge(labels != IGNORED, roi, levels[level].roi)
        return Field(labels, self._canvas.read_labels(roi, level), edge, levels[level].mpp)


def _edge(known: Mask, roi: Roi, slide: Roi) -> Mask:
    """Known pixels of `roi` beside one that is not; what lies around it is not known, but for what is off the slide."""
    around = roi.grow(1)
    unknown = np.zeros((around.height, around.width), bool)
    unknown[around.intersect(slide).within(around).slices()] = True
    unknown[1:-1, 1:-1] = ~known
    return np.asarray(known & ndimage.binary_dilation(unknown, _EIGHT)[1:-1, 1:-1])

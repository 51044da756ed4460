"""Overlapping windows, averaged: MONAI's sliding window, streamed tile by tile. It is not exact.

    |--------|                 windows of one size, a quarter of it over the one before; the last one is moved inward,
          |--------|           so that it ends where the slide ends. Each answer weighs most at its window's middle and
             |--------|        hardly anything at its border, by a Gaussian; a pixel gets the weighted mean

It is for networks that look at all of the image that they are given, as instance norm does: no halo makes their tiles fit
together. So they are run on windows of the size that they learnt from. A tile is worked out from the windows that reach into
it and from nothing else, so that memory is bounded, and a tile is the same whoever computes it and when.

Places and weights are those of `monai.inferers.SlidingWindowInferer(overlap=0.25, mode="gaussian")`, and probabilities are
what is averaged. MONAI is not asked for them: importing it takes seconds, and half a gigabyte of every worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.geometry import Lattice, Roi
from pipeline.grid import Grid, Tile, round_up
from pipeline.network import ModelSpec
from pipeline.prediction import read_ahead
from pipeline.slide import Pixels

if TYPE_CHECKING:
    from pipeline.engine import Engine

TILE_SIZE = 2048
"""Side of a tile, in pixels, where nobody chooses one: of smaller tiles more windows, those across their upper and lower
edges, are computed twice; of larger ones more sums are held in memory.
"""

_OVERLAP = 0.25
_SIGMA = 0.125  # of the window's size
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Windows:
    """Squares of `size` pixels, `interval` apart; both are multiples of `output_stride`, the pixels to one of the answer."""

    size: int
    interval: int
    output_stride: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Windows:
        """Windows as large as the patches that a model learnt from."""
        size, step = round_up(spec.patch_size, spec.stride), spec.output_stride
        return cls(size, max(int(size * (1 - _OVERLAP)) // step, 1) * step, step)

    def over(self, roi: Roi, lattice: Lattice) -> list[Roi]:
        """The windows of a lattice that reach into `roi`, row by row.

        Along a side shorter than a window there is one, with the lattice in its middle.
        """
        rows, columns = self._starts(roi.y, roi.bottom, lattice.height), self._starts(roi.x, roi.right, lattice.width)
        return [Roi(x, y, self.size, self.size) for y in rows for x in columns]

    def weights(self) -> np.ndarray:
        """What the pixels of a window's answer weigh, (size, size) / output_stride float32, above 0."""
        offsets = np.arange(self.size, dtype=np.float32) - np.float32((self.size - 1) / 2)
        bell = np.exp(offsets**2 / np.float32(-2 * (_SIGMA * self.size) ** 2))
        whole = np.maximum(np.outer(bell, bell), np.float32(_LEAST_WEIGHT))
        middle = slice(self.output_stride // 2, None, self.output_stride)  # of each pixel of the answer
        return np.ascontiguousarray(whole[middle, middle])

    def _starts(self, first: int, stop: int, length: int) -> list[int]:
        """Where windows start, along a side of a lattice, that reach into `first` to `stop`."""
        room = round_up(length, self.output_stride) - self.size
        if room <= 0:
            return [-(-room // 2 // self.output_stride * self.output_stride)]
        return [start for start in (*range(0, room, self.interval), room) if first - self.size < start < stop]


def blend(
    slide: Pixels, grid: Grid, tiles: Iterable[Tile], engine: Engine, windows: Windows
) -> Iterator[tuple[Tile, np.ndarray]]:
    """Each tile with its blended probabilities, (classes, height, width) float32, as `prediction.predict` gives exact ones.

    Windows are computed one by one, so that an answer never depends on which others there are; what reaches to the right of
    a tile is kept for the next one. Raises SlideError where the slide cannot be read.
    """
    weights, kept = windows.weights(), dict[Roi, np.ndarray]()
    for tile, pixels in read_ahead(slide, grid, (_with_windows(tile, grid.lattice, windows) for tile in tiles)):
        target, answers = tile.target(windows.output_stride), dict[Roi, np.ndarray]()
        total = np.zeros((len(engine.spec.classes), *target.shape), np.float32)
        count = np.zeros(target.shape, np.float32)
        for window in windows.over(tile.write_roi, grid.lattice):
            answer = kept.get(window)
            if answer is None:
                answer = engine(pixels[window.within(tile.read_roi).slices()][None])[0]
            if window.right > tile.write_roi.right:
                answers[window] = answer
            place = window.shrink(windows.output_stride)
            common = place.intersect(target)
            source, goal = common.within(place).slices(), common.within(target).slices()
            total[(slice(None), *goal)] += weights[source] * answer[(slice(None), *source)]
            count[goal] += weights[source]
        kept = answers
        yield tile, total / count


def _with_windows(tile: Tile, lattice: Lattice, windows: Windows) -> Tile:
    """The tile, reading all of its windows."""
    needed = windows.over(tile.write_roi, lattice)
    first, last = needed[0], needed[-1]
    return replace(tile, read_roi=Roi(first.x, first.y, last.right - first.x, last.bottom - first.y))

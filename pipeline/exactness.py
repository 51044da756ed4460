"""Holds the answer put together from tiles against one forward pass, on a real slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.engine import Engine
from pipeline.geometry import Lattice, Roi
from pipeline.grid import Grid, Tile, round_up
from pipeline.slide import Pixels
from pipeline.stitching import Stitching
from pipeline.tissue import Tissue

TOLERANCE = 1e-5
"""Largest difference of probability that counts as equal: what another order of additions costs in fp32."""

_TILE = 1024  # pixels, as when slides are segmented
_WHOLE = 4_000_000  # pixels: a slide up to this size is compared as a whole


@dataclass(frozen=True)
class Comparison:
    """What one window showed: pixels of output compared, the largest and the mean difference of a probability (0 to 1), and
    how many labels differ: within TOLERANCE, only where two classes tie to within twice that.
    """

    window: Roi
    pixels: int
    difference: float
    mean_difference: float
    label_changes: int

    @property
    def exact(self) -> bool:
        """Whether tiled equals whole."""
        return self.difference <= TOLERANCE


def comparisons(slide: Pixels, tissue: Tissue, lattice: Lattice, engine: Engine, way: Stitching) -> Iterator[Comparison]:
    """Compare the whole of a small slide, or windows of a large one that reach over the corners of its tiles.

    The windows are the top-left and the bottom-right one, where the network's own padding counts, and the one with most
    tissue. `lattice` is the slide's at the model's scale.
    """
    spec = engine.spec
    if lattice.roi.area <= _WHOLE:
        half = round_up(-(-max(lattice.shape) // 2), spec.stride)
        yield compare(slide, way.grid(lattice, min(half, _TILE)), lattice.roi, engine, way)
        return
    grid = way.grid(lattice, _TILE)
    for window in _windows(grid, tissue):
        yield compare(slide, grid, window, engine, way)


def compare(slide: Pixels, grid: Grid, window: Roi, engine: Engine, way: Stitching) -> Comparison:
    """One forward pass over a window and its surroundings against the grid's tiles, stitched.

    `window` starts at a multiple of the stride. The surroundings are twice the halo, so that the pass's own borders, where
    they are not the slide's, cannot reach the window. For a network that is not local no surroundings are enough, and the
    pass is one over the window alone.
    """
    spec = engine.spec
    surroundings = _whole_strides(window.grow(2 * (spec.halo or 0)).intersect(grid.padded.roi), grid.stride)
    whole = engine(slide.read(surroundings, grid.lattice)[None])[0]
    place = window.shrink(spec.output_stride)
    whole = whole[(slice(None), *place.within(surroundings.shrink(spec.output_stride)).slices())]
    tiles = (tile for tile in grid if tile.write_roi.intersect(window).area)
    tiled = _stitched(way.predict(slide, grid, tiles, engine), whole.shape, place, spec.output_stride)
    changes, differences = int((tiled.argmax(axis=0) != whole.argmax(axis=0)).sum()), np.abs(tiled - whole)
    return Comparison(window, place.area, float(differences.max()), float(differences.mean()), changes)


def _whole_strides(roi: Roi, stride: int) -> Roi:
    """A rectangle that starts on the stride, made larger at right and bottom until it ends there too."""
    return Roi(roi.x, roi.y, round_up(roi.width, stride), round_up(roi.height, stride))


def _stitched(
    answers: Iterable[tuple[Tile, np.ndarray]], shape: tuple[int, ...], place: Roi, output_stride: int
) -> np.ndarray:
    """The parts of the tiles' answers that lie in `place`; NaN where no tile wrote, which no comparison forgives."""
    canvas = np.full(shape, np.nan, np.float32)
    for tile, probabilities in answers:
        target = tile.target(output_stride)
        common = target.intersect(place)
        rows, columns = common.within(target).slices()
        canvas[(slice(None), *common.within(place).slices())] = probabilities[:, rows, columns]
    return canvas


def _windows(grid: Grid, tissue: Tissue) -> list[Roi]:
    """Squares of one and a half tiles, from the middle of one tile over the next."""
    lattice, half = grid.lattice, round_up(grid.write_size // 2, grid.stride)
    size = grid.write_size + half
    last_x = max(lattice.width - size, 0) // grid.stride * grid.stride
    last_y = max(lattice.height - size, 0) // grid.stride * grid.stride
    starts = [
        Roi(min(x + half, last_x), min(y + half, last_y), size, size)
        for y in range(0, max(last_y, 1), grid.write_size)
        for x in range(0, max(last_x, 1), grid.write_size)
    ]
    fullest = max(starts, key=lambda roi: tissue.fraction(roi.intersect(lattice.roi), lattice))
    end = Roi(last_x, last_y, lattice.width - last_x, lattice.height - last_y)
    corners = [Roi(0, 0, size, size), end, fullest]
    return [roi.intersect(lattice.roi) for roi in corners]

"""Which pixels a set of polygons covers: exact, tile-invariant, and fast enough for every patch.

A pixel is covered if its centre is. Along each row of centres, an edge that the row crosses adds +1 or -1 at the first
centre past it; the running sum is the number of polygons over each pixel:

    polygon      /--------------\\
    row      . . | . . . . . . . | . .
    steps    0 0 +1 0 0 0 0 0 0 -1 0 0
    sum      0 0 1 1 1 1 1 1 1 1 0 0 0

Crossings are worked out in base pixels from the row's number on the whole lattice, never from the window's corner, so
that a window read at once or in pieces gives the same bytes. A centre exactly on an edge belongs to the polygon on its
right or below: neighbours that share an edge neither overlap nor leave a gap. (`rasterio.features.rasterize` agrees
away from such ties, but works in window coordinates and converts every polygon anew for each call: 3 to 6 ms for a
patch of 256 x 256 px among glands, against 0.4 ms here.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.geometry import Lattice, Roi


class Stencil:
    """One or more valid polygons in base pixels, prepared to be filled on any window of any lattice.

    `bounds` is a float64 array (4,): left, top, right and bottom of them all.
    """

    def __init__(self, geometries: Sequence[shapely.Polygon | shapely.MultiPolygon]) -> None:
        polygons = shapely.orient_polygons(shapely.get_parts(np.asarray(geometries, dtype=object)))
        rings, polygon_of_ring = shapely.get_rings(polygons, return_index=True)
        points, ring_of_point = shapely.get_coordinates(rings, return_index=True)
        # An edge joins two neighbouring points of one ring. Level edges never cross a row.
        is_edge = (ring_of_point[:-1] == ring_of_point[1:]) & (points[:-1, 1] != points[1:, 1])
        start, end = points[:-1][is_edge], points[1:][is_edge]
        # Upper end first, so that two polygons compute the same crossings for an edge that they share.
        down = (start[:, 1] < end[:, 1])[:, None]
        upper, lower = np.where(down, start, end), np.where(down, end, start)
        self.bounds: NDArray[np.float64] = shapely.total_bounds(polygons)
        self._boxes: NDArray[np.float64] = shapely.bounds(polygons).reshape(-1, 4)
        self._upper, self._bottom = upper, lower[:, 1]
        with np.errstate(over="ignore"):  # of an edge that is too low to cross a row
            self._slope = (lower[:, 0] - upper[:, 0]) / (lower[:, 1] - upper[:, 1])
        # orient_polygons leaves the polygon on the right of every edge that goes up the rows: such an edge opens a run.
        self._step = np.where(down[:, 0], -1, 1).astype(np.int16)
        owner = polygon_of_ring[ring_of_point[:-1][is_edge]]
        self._first_edge = np.searchsorted(owner, np.arange(len(polygons) + 1))

    def reaches(self, base: Lattice) -> NDArray[np.bool_]:
        """Which polygons' boxes lie, at least in part, on the lattice of the polygons' coordinates: (polygons,)."""
        left, top, right, bottom = self._boxes.T
        return np.asarray((right > 0) & (bottom > 0) & (left < base.width) & (top < base.height))

    def fill(self, roi: Roi, lattice: Lattice, base: Lattice) -> NDArray[np.bool_]:
        """Which pixels of `roi`, a window of `lattice`, have their centre in a polygon.

        Returns a bool array (rows, columns). `base` is the lattice of the polygons' coordinates.
        """
        scale_x, scale_y = lattice.scale_to(base)
        edges = self._edges_near(roi, scale_x, scale_y)
        first = np.clip(_first_centre(self._upper[edges, 1], scale_y), roi.y, roi.bottom)
        past = np.clip(_first_centre(self._bottom[edges], scale_y), roi.y, roi.bottom)
        if not (past > first).any():
            return np.zeros(roi.shape, dtype=np.bool_)
        rows, which = _spans(first, past - first)
        edge = edges[which]
        x = self._upper[edge, 0] + ((rows + 0.5) * scale_y - self._upper[edge, 1]) * self._slope[edge]
        columns = np.clip(_first_centre(x, scale_x), roi.x, roi.right)
        steps = np.zeros((roi.height, roi.width + 1), dtype=np.int16)  # the last column takes what ends past the window
        np.add.at(steps, (rows - roi.y, columns - roi.x), self._step[edge])
        inside: NDArray[np.bool_] = np.cumsum(steps[:, :-1], axis=1, dtype=np.int16) > 0
        return inside

    def _edges_near(self, roi: Roi, scale_x: float, scale_y: float) -> NDArray[np.int64]:
        """Indices of the edges of every polygon whose box meets the window."""
        left, top, right, bottom = self._boxes.T
        meets = (left < roi.right * scale_x) & (right > roi.x * scale_x)
        meets &= (top < roi.bottom * scale_y) & (bottom > roi.y * scale_y)
        polygons = np.flatnonzero(meets)
        first = self._first_edge[polygons]
        return _spans(first, self._first_edge[polygons + 1] - first)[0]


def _first_centre(position: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
    """Index of the first pixel whose centre is at `position` (base pixels) or past it."""
    return np.ceil(position / scale - 0.5).astype(np.int64)


def _spans(first: NDArray[np.int64], length: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The integers of many ranges [first, first + length) in a row, and the range that each belongs to."""
    which = np.repeat(np.arange(len(first)), length)
    return np.arange(len(which)) - np.repeat(np.cumsum(length) - length - first, length), which

"""Rings of points, as files hold them, made into valid polygons: all at once, since one by one takes four times as long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

Area = shapely.Polygon | shapely.MultiPolygon
"""A region of a slide, in base pixels."""

_FARTHEST = 1e9  # pixels: no slide is as large, and arithmetic beyond it is noise


class Drawing:
    """Gathers objects as they are written, then makes valid polygons of them all.

    Points that are no place (NaN, infinite, past any slide) are left out, and then rings with fewer than three points;
    without its shell, a polygon is nothing. Where an outline crosses itself, everything that it winds around counts as
    inside, as in ASAP's own masks. A hole that lies beside its shell is none.
    """

    def __init__(self) -> None:
        self._rings: list[NDArray[np.float64]] = []
        self._polygon_of_ring: list[int] = []
        self._object_of_polygon: list[int] = []
        self._objects = 0

    def add(self, polygons: Sequence[Sequence[NDArray[np.float64]]]) -> None:
        """Note one object: its polygons, each a list of rings (the shell, then holes) of float64 (points, 2)."""
        for rings in polygons:
            self._polygon_of_ring += [len(self._object_of_polygon)] * len(rings)
            self._object_of_polygon.append(self._objects)
            self._rings += rings
        self._objects += 1

    def areas(self) -> tuple[list[Area], int]:
        """All objects in their order, valid, empty where nothing is enclosed; and how many had to be repaired."""
        areas, repaired = self._assemble()
        for index in np.flatnonzero(~shapely.is_valid(areas)):
            repaired[index], areas[index] = True, _without_stray_holes(areas[index])
        areas[repaired] = _mended(areas[repaired])
        for index in np.flatnonzero(~shapely.is_valid(areas)):  # lobes laid side by side, not merged
            areas[index] = shapely.union_all([areas[index]])
        return list(areas), int((repaired & (shapely.area(areas) > 0)).sum())

    def _assemble(self) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
        """(the objects as written, which lost points)."""
        polygon_of = np.asarray(self._polygon_of_ring, dtype=np.int64)
        object_of = np.asarray(self._object_of_polygon, dtype=np.int64)
        points, ring_of, lost = self._places()
        usable = np.bincount(ring_of, minlength=len(polygon_of)) >= 3
        shells, first = np.unique(polygon_of, return_index=True)
        drawn = np.zeros(len(object_of), dtype=np.bool_)
        drawn[shells] = usable[first]
        kept = usable & drawn[polygon_of]
        inked = kept[ring_of]
        rings, polygons = np.full(len(kept), None), np.full(len(drawn), None)
        areas = np.full(self._objects, shapely.MultiPolygon(), dtype=np.object_)
        shapely.linearrings(points[inked], indices=ring_of[inked], out=rings)
        shapely.polygons(rings[kept], indices=polygon_of[kept], out=polygons)
        shapely.multipolygons(polygons[drawn], indices=object_of[drawn], out=areas)
        single = shapely.get_num_geometries(areas) == 1
        areas[single] = shapely.get_geometry(areas[single], 0)
        trimmed = np.zeros(self._objects, dtype=np.bool_)
        trimmed[object_of[polygon_of[lost | ~kept]]] = True
        return areas, trimmed

    def _places(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
        """(points that are places, without a ring's last where it repeats the first; their rings; which rings lost some)."""
        points = np.concatenate([np.empty((0, 2)), *self._rings])
        lengths = np.asarray([len(ring) for ring in self._rings], dtype=np.int64)
        ring_of = np.repeat(np.arange(len(lengths)), lengths)
        is_place = (np.abs(points) < _FARTHEST).all(axis=1)
        lost = np.bincount(ring_of[~is_place], minlength=len(lengths)) > 0
        last = np.cumsum(lengths)[lengths > 0] - 1
        first = last + 1 - lengths[lengths > 0]
        is_place[last] &= (points[last] != points[first]).any(axis=1)
        return points[is_place], ring_of[is_place], lost


def _without_stray_holes(area: Area) -> Area:
    """An area without the holes that do not meet their shell, which would be mended into more of it."""
    parts = [_met(part) for part in shapely.get_parts(area)]
    return shapely.MultiPolygon(parts) if len(parts) > 1 else parts[0]


def _met(polygon: shapely.Polygon) -> shapely.Polygon:
    if not polygon.interiors:
        return polygon
    holes = [shapely.Polygon(ring) for ring in polygon.interiors]
    met = shapely.intersects(_mended([shapely.Polygon(polygon.exterior)]), _mended(holes))
    return shapely.Polygon(polygon.exterior, [hole.exterior for hole, meets in zip(holes, met, strict=True) if meets])


def _mended(areas: Sequence[Area] | NDArray[np.object_]) -> NDArray[np.object_]:
    """The areas, valid."""
    mended: NDArray[np.object_] = shapely.make_valid(areas, method="structure", keep_collapsed=False)
    return mended

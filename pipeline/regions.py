"""From a canvas to regions: connected pixels of one class, outlined along pixel edges and joined across blocks.

    band by band, side by side     blocks --> regions that end in the band, and those that reach its edges
    then once                      the latter of all bands --> the regions that they make

A band is a row of tiles, read block by block, one row of blocks after the other. A region that touches no edge of its block
is finished at once; the others wait until no row of blocks below can reach them any more.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby

import numpy as np

from pipeline.ahead import ahead
from pipeline.canvas import Canvas
from pipeline.classes import IGNORED
from pipeline.components import find_runs
from pipeline.contours import Rings, find_corners, trace_rings
from pipeline.geometry import Lattice, Roi
from pipeline.machine import threads
from pipeline.open_regions import Component, Edge, OpenRegions, Waiting

_BATCH = 60_000  # corners that are made into outlines at once


@dataclass(frozen=True)
class Region:
    """Connected pixels (by their sides) of one class, or a part of them, where their outline is too long for one polygon.

    `rings` are in base pixels, the outer one and its holes; at the canvas's right and lower edge they may reach past the
    slide, by less than a pixel of the canvas. `area_um2` is in square micrometres; `mean_probability`, of its class, 0 to 1.
    `part` says whether it is a part.
    """

    class_index: int
    rings: Rings
    area_um2: float
    mean_probability: float
    part: bool


def band_regions(
    canvas: Canvas, band: int, base: Lattice, min_area_um2: float, skip: Collection[int]
) -> Generator[Region, None, OpenRegions]:
    """The regions that end within a band of the canvas, from top to bottom by where they end; returns what it leaves open.

    They are of all classes but those whose index is in `skip`, outlined in pixels of `base`. Regions below `min_area_um2`
    are left out, but not parts of larger ones. Memory grows with the blocks of a row, not with the slide.
    """
    finish, waiting, first = _Finish.of(canvas, base, min_area_um2), Waiting(), 1
    nothing = Edge.empty(canvas.lattice.width)
    upper, above, whole = Edge.empty(canvas.lattice.width), nothing, canvas.tile_roi((band, 0))
    rows = chain.from_iterable(canvas.block_rows(band))
    blocks = ahead(partial(_Block.read, canvas, skip=skip), rows, 2 * threads(), threads())
    for y, row in groupby(blocks, key=lambda found: found[0].y):
        below, left, right = Edge.empty(canvas.lattice.width), nothing, -1
        for roi, uncounted in row:
            block = replace(uncounted, first=first)
            first += len(block.pixels)
            yield from finish.inner(block)
            waiting.add(block.components(block.touching))
            waiting.join(above.part(roi.x, roi.right), block.edge(0, slice(None)))
            if roi.x == right:
                waiting.join(left, block.edge(slice(None), 0))
            left, right = block.edge(slice(None), -1), roi.right
            below.fill(roi.x, block.edge(-1, slice(None)))
            if y == whole.y:
                upper.fill(roi.x, block.edge(0, slice(None)))
        yield from finish.regions(waiting.release(upper, below))
        above = below
    return OpenRegions(whole.y, whole.bottom, first, upper, above, waiting.components())


def joined_regions(canvas: Canvas, bands: Iterable[OpenRegions], base: Lattice, min_area_um2: float) -> Iterator[Region]:
    """The regions that reach edges of bands, which come from top to bottom; see `band_regions`."""
    finish, waiting = _Finish.of(canvas, base, min_area_um2), Waiting()
    above, bottom, first = Edge.empty(canvas.lattice.width), -1, 0
    for counted in bands:
        band = counted.numbered_from(first)
        first = band.last
        if band.top != bottom:
            yield from finish.regions(waiting.release())
            above = Edge.empty(canvas.lattice.width)
        waiting.add(band.components)
        waiting.join(above, band.upper)
        yield from finish.regions(waiting.release(band.lower))
        above, bottom = band.lower, band.bottom
    yield from finish.regions(waiting.release())


@dataclass(frozen=True)
class _Block:
    """One block of the canvas with its components, counted from `first`, and their corners as `find_corners` has them.

    `labels` and `ids` are (rows, columns); ids counts components from 0, and is -1 where there is none. `pixels`,
    `weights` (sums of probability, 0 to 255), `classes` and `touching` (whether it reaches the block's edge) have one
    item a component.
    """

    roi: Roi
    first: int
    labels: np.ndarray
    ids: np.ndarray
    pixels: np.ndarray
    weights: np.ndarray
    classes: np.ndarray
    touching: np.ndarray
    owners: np.ndarray
    corners: np.ndarray

    @classmethod
    def read(cls, canvas: Canvas, roi: Roi, skip: Collection[int]) -> _Block:
        """A block with its components counted from 0."""
        labels = canvas.read_labels(roi)
        for index in skip:
            labels[labels == index] = IGNORED
        runs = find_runs(labels)
        # Of blocks of the rest alone, which are most of many a slide, nobody asks how sure they are.
        confidence = canvas.read_probabilities(roi).max(axis=0).ravel() if runs.count else np.zeros(labels.size, np.uint8)
        sums = np.add.reduceat(confidence, runs.starts, dtype=np.uint32)
        owners, count = runs.components + 1, runs.count + 1  # what is of no component counts for one before the first
        pixels, weights = (np.bincount(owners, values, minlength=count) for values in (runs.lengths, sums))
        classes, touching = np.zeros(count, np.uint8), np.zeros(count, bool)
        classes[owners] = runs.labels
        numbers = runs.image(labels.shape)
        for line in (numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]):
            touching[line + 1] = True
        corner_owners, corners = find_corners(labels, numbers)
        corners += np.array([roi.y, roi.x, 0], np.int32)
        of_components = (pixels[1:], weights[1:], classes[1:], touching[1:])
        return cls(roi, 0, labels, numbers, *of_components, corner_owners, corners)

    def edge(self, rows: int | slice, columns: int | slice) -> Edge:
        return Edge(self.labels[rows, columns], self.ids[rows, columns].astype(np.int64) + self.first)

    def components(self, chosen: np.ndarray) -> Iterator[Component]:
        """The components for which `chosen`, one bool each, is true."""
        numbers = np.flatnonzero(chosen)
        starts, stops = (np.searchsorted(self.owners, numbers, side) for side in ("left", "right"))
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True):
            pixels, weight = int(self.pixels[number]), float(self.weights[number])
            own = [self.corners[start:stop].copy()]
            yield Component(self.first + number, int(self.classes[number]), pixels, weight, own, stop - start)


@dataclass(frozen=True)
class _Finish:
    """What turns whole components into regions."""

    scale: tuple[float, float]
    pixel_um2: float
    min_area_um2: float

    @classmethod
    def of(cls, canvas: Canvas, base: Lattice, min_area_um2: float) -> _Finish:
        return cls(canvas.lattice.scale_to(base), canvas.lattice.mpp.area_um2, min_area_um2)

    def large(self, pixels: np.ndarray) -> np.ndarray:
        """Whether components of so many pixels are large enough."""
        return np.asarray(pixels * self.pixel_um2 >= self.min_area_um2)

    def inner(self, block: _Block) -> Iterator[Region]:
        """The regions of a block that do not reach its edge: their corners lie together already, and need no joining."""
        chosen = ~block.touching & self.large(block.pixels)
        numbers = np.flatnonzero(chosen)
        if not len(numbers):
            return
        total = np.cumsum(np.bincount(block.owners, minlength=len(chosen))[numbers])
        for batch in np.split(numbers, np.flatnonzero(np.diff(total // _BATCH)) + 1):
            part = slice(*np.searchsorted(block.owners, (batch[0], batch[-1] + 1)))
            own = chosen[block.owners[part]]
            outlines = trace_rings(block.owners[part][own], block.corners[part][own], self.scale)
            parts = np.zeros(len(batch), bool)
            yield from self._measured(outlines, block.classes[batch], block.pixels[batch], block.weights[batch], parts)

    def regions(self, components: Iterable[Component]) -> Iterator[Region]:
        """The regions of components, so many at once that their corners fit into memory."""
        batch: list[Component] = []
        corners = 0
        for component in components:
            batch.append(component)
            corners += component.length
            if corners > _BATCH:
                yield from self._outline(batch)
                batch, corners = [], 0
        yield from self._outline(batch)

    def _outline(self, batch: list[Component]) -> Iterator[Region]:
        large = self.large(np.array([component.pixels for component in batch]))
        batch = [component for component, enough in zip(batch, large, strict=True) if enough or component.cut]
        if not batch:
            return
        owners = np.repeat(np.arange(len(batch)), [component.length for component in batch])
        corners = np.concatenate([piece for component in batch for piece in component.corners])
        outlines = trace_rings(owners, corners, self.scale)
        facts = np.array([(part.class_index, part.pixels, part.weight, part.cut) for part in batch])
        yield from self._measured(outlines, *facts.T)

    def _measured(
        self, outlines: list[Rings], classes: np.ndarray, pixels: np.ndarray, weights: np.ndarray, parts: np.ndarray
    ) -> Iterator[Region]:
        areas, means = pixels * self.pixel_um2, weights / (255 * pixels)
        facts = (areas.tolist(), means.tolist(), parts.astype(bool).tolist())
        return map(Region, classes.astype(int).tolist(), outlines, *facts)

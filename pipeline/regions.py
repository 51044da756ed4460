"""From a canvas to regions: connected pixels of one class, outlined along pixel edges and joined across blocks.

The canvas is read block by block, one row of blocks after the other. A region that touches no edge of its block is
finished at once; the others wait until no row of blocks below can reach them any more. What would become too long an outline
to hold in memory, such as that of stroma with all its holes throughout a slide, is cut along edges of blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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

_LONGEST = 250_000  # corners of a region that goes on in another block: longer outlines are cut
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


def find_regions(canvas: Canvas, base: Lattice, min_area_um2: float = 0.0, skip: Collection[int] = ()) -> Iterator[Region]:
    """The regions of all classes but those whose index is in `skip`, from top to bottom by where they end.

    Outlines are in pixels of `base`; regions below `min_area_um2` are left out, but not parts of larger ones. Memory grows
    with the blocks of a row, not with the slide.
    """
    finish = _Finish(canvas.lattice.scale_to(base), canvas.lattice.mpp.area_um2, min_area_um2)
    waiting, nothing = _Waiting(), _Edge.empty(canvas.lattice.width)
    above, bottom, first = nothing, 0, 1
    blocks = ahead(
        partial(_Block.read, canvas, skip=skip), chain.from_iterable(canvas.block_rows()), 2 * threads(), threads()
    )
    for top, row in groupby(blocks, key=lambda found: found[0].y):
        if top != bottom:
            yield from finish.regions(waiting.release(nothing))
            above = nothing
        below, left, right = _Edge.empty(canvas.lattice.width), nothing, -1
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
        yield from finish.regions(waiting.release(below))
        above, bottom = below, roi.bottom
    yield from finish.regions(waiting.release(nothing))


@dataclass
class _Component:
    """A region, or what is known of it: `corners` are (n, 3) int32 arrays of row, column and mask of vertices, `length` is
    how many they are together. What is `cut` is a part of a larger region.
    """

    number: int
    class_index: int
    pixels: int
    weight: float
    corners: list[np.ndarray]
    length: int
    cut: bool = False

    def absorb(self, other: _Component) -> None:
        self.pixels += other.pixels
        self.weight += other.weight
        self.corners.extend(other.corners)
        self.length += other.length
        self.cut |= other.cut


@dataclass(frozen=True)
class _Edge:
    """A line of pixels: their class indices (IGNORED where none) and the numbers of their components."""

    labels: np.ndarray
    numbers: np.ndarray

    @classmethod
    def empty(cls, length: int) -> _Edge:
        return cls(np.full(length, IGNORED, np.uint8), np.zeros(length, np.int64))

    def part(self, start: int, stop: int) -> _Edge:
        return _Edge(self.labels[start:stop], self.numbers[start:stop])

    def fill(self, start: int, other: _Edge) -> None:
        stop = start + len(other.labels)
        self.labels[start:stop], self.numbers[start:stop] = other.labels, other.numbers


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

    def edge(self, rows: int | slice, columns: int | slice) -> _Edge:
        return _Edge(self.labels[rows, columns], self.ids[rows, columns].astype(np.int64) + self.first)

    def components(self, chosen: np.ndarray) -> Iterator[_Component]:
        """The components for which `chosen`, one bool each, is true."""
        numbers = np.flatnonzero(chosen)
        starts, stops = (np.searchsorted(self.owners, numbers, side) for side in ("left", "right"))
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True):
            pixels, weight = int(self.pixels[number]), float(self.weights[number])
            own = [self.corners[start:stop].copy()]
            yield _Component(self.first + number, int(self.classes[number]), pixels, weight, own, stop - start)


class _Waiting:
    """Components that may go on in blocks not yet read, joined where they meet (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._components: dict[int, _Component] = {}

    def add(self, components: Iterable[_Component]) -> None:
        for component in components:
            self._parents[component.number] = component.number
            self._components[component.number] = component

    def join(self, one: _Edge, other: _Edge) -> None:
        """Join what is of one class on either side of two edges that lie side by side, unless it would be too long."""
        meet = (one.labels == other.labels) & (one.labels != IGNORED)
        pairs = np.unique(np.stack([one.numbers[meet], other.numbers[meet]]), axis=1)
        for pair in pairs.T.tolist():
            first, second = (self._components[self._root(number)] for number in pair)
            if first is second:
                continue
            if first.length + second.length > _LONGEST:
                first.cut = second.cut = True
                continue
            small, large = sorted((first, second), key=lambda component: len(component.corners))
            self._parents[small.number] = large.number
            large.absorb(self._components.pop(small.number))

    def release(self, below: _Edge) -> list[_Component]:
        """Hand out the components that do not reach the edge `below`; on it, number the others by their roots."""
        inside = below.labels != IGNORED
        numbers, places = np.unique(below.numbers[inside], return_inverse=True)
        roots = np.array([self._root(number) for number in numbers.tolist()], np.int64)
        below.numbers[inside] = roots[places]
        reached = set(roots.tolist())
        finished = [component for root, component in self._components.items() if root not in reached]
        self._components = {root: self._components[root] for root in reached}
        self._parents = {root: root for root in reached}
        return finished

    def _root(self, number: int) -> int:
        while (parent := self._parents[number]) != number:
            self._parents[number] = number = self._parents[parent]
        return number


@dataclass(frozen=True)
class _Finish:
    """What turns whole components into regions."""

    scale: tuple[float, float]
    pixel_um2: float
    min_area_um2: float

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

    def regions(self, components: Iterable[_Component]) -> Iterator[Region]:
        """The regions of components, so many at once that their corners fit into memory."""
        batch: list[_Component] = []
        corners = 0
        for component in components:
            batch.append(component)
            corners += component.length
            if corners > _BATCH:
                yield from self._outline(batch)
                batch, corners = [], 0
        yield from self._outline(batch)

    def _outline(self, batch: list[_Component]) -> Iterator[Region]:
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

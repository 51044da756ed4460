"""Regions that may go on where nobody has looked yet: what is known of them, and where they meet.

A canvas is looked at piece by piece. What reaches the edge of a piece waits until what lies beyond it is known; what belongs
together on both sides is then joined. What would become too long an outline to hold in memory, such as that of stroma with
all its holes throughout a slide, is cut along edges instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.classes import IGNORED
from pipeline.files import replacing

_LONGEST = 250_000  # corners of a region that goes on in another piece: longer outlines are cut


@dataclass
class Component:
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

    def absorb(self, other: Component) -> None:
        """Become one with the other."""
        self.pixels += other.pixels
        self.weight += other.weight
        self.corners.extend(other.corners)
        self.length += other.length
        self.cut |= other.cut


@dataclass(frozen=True)
class Edge:
    """A line of pixels: their class indices (IGNORED where none) and the numbers of their components."""

    labels: np.ndarray
    numbers: np.ndarray

    @classmethod
    def empty(cls, length: int) -> Edge:
        """One with nothing on it."""
        return cls(np.full(length, IGNORED, np.uint8), np.zeros(length, np.int64))

    def part(self, start: int, stop: int) -> Edge:
        """Its pixels from `start` to before `stop`."""
        return Edge(self.labels[start:stop], self.numbers[start:stop])

    def fill(self, start: int, other: Edge) -> None:
        """Put the other's pixels in the place of its own, from `start` on."""
        stop = start + len(other.labels)
        self.labels[start:stop], self.numbers[start:stop] = other.labels, other.numbers


@dataclass(frozen=True)
class OpenRegions:
    """What a band of rows, `top` to before `bottom`, leaves open: the components that reach its first or its last row.

    `upper` and `lower` are these two rows. Components are numbered from 1 to `last`.
    """

    top: int
    bottom: int
    last: int
    upper: Edge
    lower: Edge
    components: tuple[Component, ...]

    def numbered_from(self, first: int) -> OpenRegions:
        """The same with numbers that are larger by `first`."""
        components = tuple(replace(component, number=component.number + first) for component in self.components)
        upper, lower = (Edge(edge.labels, edge.numbers + first) for edge in (self.upper, self.lower))
        return OpenRegions(self.top, self.bottom, self.last + first, upper, lower, components)

    def save(self, path: Path) -> None:
        """Write them as an NPZ file, whole or not at all."""
        facts = [(item.number, item.class_index, item.pixels, item.length, item.cut) for item in self.components]
        corners = [piece for item in self.components for piece in item.corners]
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                rows=np.array([self.top, self.bottom, self.last]),
                labels=np.stack([self.upper.labels, self.lower.labels]),
                numbers=np.stack([self.upper.numbers, self.lower.numbers]),
                facts=np.array(facts, np.int64).reshape(-1, 5),
                weights=np.array([item.weight for item in self.components]),
                corners=np.concatenate([np.empty((0, 3), np.int32), *corners]),
            )

    @classmethod
    def load(cls, path: Path) -> OpenRegions:
        """Read what `save` wrote. Raises OSError where there is no such file."""
        with np.load(path) as file:
            corners = np.split(file["corners"], np.cumsum(file["facts"][:, 3]))[:-1]
            facts = zip(file["facts"].tolist(), file["weights"].tolist(), corners, strict=True)
            components = tuple(
                Component(number, class_index, pixels, weight, [own], length, bool(cut))
                for (number, class_index, pixels, length, cut), weight, own in facts
            )
            upper, lower = map(Edge, file["labels"], file["numbers"])
            top, bottom, last = file["rows"].tolist()
            return cls(top, bottom, last, upper, lower, components)


class Waiting:
    """Components that may go on in blocks not yet read, joined where they meet (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._components: dict[int, Component] = {}

    def add(self, components: Iterable[Component]) -> None:
        """Let them wait."""
        for component in components:
            self._parents[component.number] = component.number
            self._components[component.number] = component

    def join(self, one: Edge, other: Edge) -> None:
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

    def release(self, *edges: Edge) -> list[Component]:
        """Hand out the components that reach none of the edges; on these, number the others by their roots."""
        reached: set[int] = set()
        for edge in edges:
            inside = edge.labels != IGNORED
            numbers, places = np.unique(edge.numbers[inside], return_inverse=True)
            roots = np.array([self._root(number) for number in numbers.tolist()], np.int64)
            edge.numbers[inside] = roots[places]
            reached.update(roots.tolist())
        finished = [component for root, component in self._components.items() if root not in reached]
        self._components = {root: self._components[root] for root in reached}
        self._parents = {root: root for root in reached}
        return finished

    def components(self) -> tuple[Component, ...]:
        """All that wait."""
        return tuple(self._components.values())

    def _root(self, number: int) -> int:
        while (parent := self._parents[number]) != number:
            self._parents[number] = number = self._parents[parent]
        return number

"""What training reads: patches and their truth, drawn evenly over classes and slides, in an order that one seed decides.

Every patch is a pure function of (seed, epoch, position): any process can make any patch of the stream, so training may be
resumed, or shared between processes, without a state to carry over. A patch that cannot be read, since its slide is damaged
there, is drawn anew from (seed, epoch, position, attempt); the others stay what they are.

Patches are prepared by threads of this process, not by the worker processes of a torch DataLoader: training runs in a Dask
worker, a daemonic process, which may have no children; and OpenSlide, numpy, scipy and torch all release the interpreter
lock while they work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
from pyarrow import parquet

from pipeline.ahead import ahead
from pipeline.augment import Augmentation, augment
from pipeline.errors import SlideError, TrainingError
from pipeline.geometry import Lattice, Roi
from pipeline.slide import Pixels
from pipeline.truth import Truth

_AHEAD = 2  # batches that are prepared or waiting to be taken
_ATTEMPTS = 20  # at a patch that cannot be read, each at another place, until the slides are given up
_AUGMENTING = 1  # tells a patch's second random stream from its first; numpy takes a 0 at the end of a seed for nothing

Patch = tuple[np.ndarray, np.ndarray]
"""An image (S, S, 3) uint8 RGB and its mask (S, S) uint8 of class indices, IGNORED where nothing is known."""

Batch = tuple[np.ndarray, np.ndarray]
"""Images (N, S, S, 3) and masks (N, S, S) of patches."""


@dataclass(frozen=True)
class Source:
    """A slide, its truth, and the lattice on which the model sees it."""

    slide: Pixels
    truth: Truth
    lattice: Lattice

    def read(self, roi: Roi) -> Patch:
        """The image and the mask of a rectangle of the lattice."""
        return self.slide.read(roi, self.lattice), self.truth.read(roi, self.lattice)


@dataclass(frozen=True)
class Place:
    """Where a patch is: a rectangle of its slide's lattice, which may hang over the lattice's edge."""

    slide_id: str
    roi: Roi


@dataclass(frozen=True, eq=False)
class PatchIndex:
    """The n cells from which patches are drawn, sorted by slide.

    `slides` (n,) int counts in `slide_ids`; `corners` (n, 2) int are x and y of a cell's top-left pixel; `fractions`
    (n, classes), 0 to 1, is the share of the cell that each class covers.
    """

    slide_ids: tuple[str, ...]
    slides: np.ndarray
    corners: np.ndarray
    fractions: np.ndarray

    def draw(self, size: int, seed: int, epoch: int, position: int, attempt: int = 0) -> Place:
        """The place of one patch of `size` pixels: a class, then a slide that has it, then a cell in proportion to it.

        Classes are equally likely. A slide's chance grows with the square root of what it holds: large slides do not drown
        small ones, and a slide of one field is not seen as often as one of thirty. The patch lies up to half its size beside
        the cell, in any direction. Each attempt gives another place.
        """
        again = [_AUGMENTING + attempt] if attempt else []  # which is no other stream's
        rng = np.random.default_rng([seed, epoch, position, *again])
        mass = self._slide_mass
        column = rng.choice(np.flatnonzero(mass.any(axis=0)))
        chances = np.sqrt(mass[:, column])
        slide = rng.choice(len(chances), p=chances / chances.sum())
        first, last = self._bounds[slide], self._bounds[slide + 1]
        before = self._cumulated[first, column]
        reach = before + rng.uniform() * mass[slide, column]
        cells = self._cumulated[first + 1 : last + 1, column]
        cell = first + np.searchsorted(cells, min(reach, np.nextafter(cells[-1], before)), side="right")
        x, y = self.corners[cell] + rng.integers(-(size // 2), size // 2, 2, endpoint=True)
        return Place(self.slide_ids[slide], Roi(int(x), int(y), size, size))

    @cached_property
    def _cumulated(self) -> np.ndarray:
        """(n + 1, classes): how much of each class the cells before each one hold."""
        held = np.cumsum(self.fractions, axis=0, dtype=np.float64)
        return np.vstack([np.zeros(held.shape[1]), held])

    @cached_property
    def _bounds(self) -> np.ndarray:
        """(slides + 1,): the first cell of each slide, and the end."""
        return np.searchsorted(self.slides, np.arange(len(self.slide_ids) + 1))

    @cached_property
    def _slide_mass(self) -> np.ndarray:
        """(slides, classes): how much of each class each slide holds."""
        return np.diff(self._cumulated[self._bounds], axis=0)


def read_index(path: Path, class_names: Sequence[str], split: str) -> PatchIndex:
    """The cells of one split from a table of tiles, sorted by slide and place, whatever the order of its rows.

    Raises TrainingError where the table lacks a class, or the split holds no pixel of any.
    """
    table = parquet.read_table(path)
    missing = [name for name in class_names if name not in table.column_names]
    if missing:
        raise _index_error(path, f"no column for the classes {missing}", "one for every class")
    table = table.filter(np.asarray(table["split"]) == split).sort_by([(key, "ascending") for key in ("slide_id", "y", "x")])
    fractions = np.array([np.asarray(table[name]) for name in class_names], np.float64).T
    if not fractions.any():
        raise _index_error(path, f"no known pixel of {list(class_names)} in the split {split!r}", "something to learn from")
    slide_ids, slides = np.unique(np.asarray(table["slide_id"]).astype(str), return_inverse=True)
    corners = np.stack([np.asarray(table["x"]), np.asarray(table["y"])], axis=1)
    return PatchIndex(tuple(slide_ids.tolist()), slides, corners, fractions)


def _index_error(path: Path, found: str, expected: str) -> TrainingError:
    return TrainingError(str(path), found, expected, "Check the annotations' names and the splits, then tile again.")


def inside(roi: Roi, lattice: Lattice) -> Roi:
    """A rectangle that hangs over the lattice's edge, mirrored back inside; one larger than the lattice is centred on it."""
    return Roi(_fold(roi.x, lattice.width - roi.width), _fold(roi.y, lattice.height - roi.height), roi.width, roi.height)


def _fold(start: int, limit: int) -> int:
    if limit <= 0:
        return limit // 2
    start %= 2 * limit
    return min(start, 2 * limit - start)


@dataclass(frozen=True)
class PatchStream:
    """An endless stream of augmented patches for every epoch, of `size` pixels, prepared by a number of threads.

    `unread` gathers the slides of which a patch could not be read.
    """

    index: PatchIndex
    sources: Mapping[str, Source]
    augmentation: Augmentation
    size: int
    seed: int
    threads: int
    unread: set[str] = field(default_factory=set)

    def patch(self, epoch: int, position: int) -> Patch:
        """One patch of the stream: depends on nothing but the seed, the epoch and the position.

        Raises SlideError where one attempt after the other meets what cannot be read.
        """
        rng = np.random.default_rng([self.seed, epoch, position, _AUGMENTING])
        return augment(*self._read(epoch, position), rng, self.augmentation, self.size)

    def _read(self, epoch: int, position: int) -> Patch:
        """The pixels of a patch with those around it that augmenting takes: of the first attempt that can be read."""
        for attempt in range(_ATTEMPTS):
            place = self.index.draw(self.size, self.seed, epoch, position, attempt)
            source = self.sources[place.slide_id]
            try:
                return source.read(inside(place.roi, source.lattice).grow(self.augmentation.margin(self.size)))
            except SlideError as error:
                self.unread.add(place.slide_id)
                unreadable = error
        raise unreadable

    def batches(self, epoch: int, positions: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """The patches at `positions`, in that order.

        Each batch has `batch_size` patches, the last what remains. Threads work two batches ahead of the caller; they end
        with the iterator, also where it is closed or dropped early. What a thread raises is raised here, in its turn.
        """
        patches = ahead(partial(self.patch, epoch), positions, _AHEAD * batch_size + 1, self.threads)
        while batch := [patch for _, patch in islice(patches, batch_size)]:
            yield np.stack([image for image, _ in batch]), np.stack([mask for _, mask in batch])

"""What training reads: patches and their truth, drawn evenly over classes and slides, in an order that one seed decides.

    a class --> a slide that has it --> a cell of the table of tiles --> a pixel of the class in it --> a patch round that

Every patch is a pure function of (seed, epoch, position): any process can make any patch of the stream, so training may be
resumed, or shared between processes, without a state to carry over. A patch that cannot be read, since its slide is damaged
there, is drawn anew from (seed, epoch, position, attempt); the others stay what they are.

Patches are prepared by threads of this process, not by the worker processes of a torch DataLoader: training runs in a Dask
worker, a daemonic process, which may have no children; and OpenSlide, numpy, scipy and torch all release the interpreter
lock while they work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.ahead import ahead
from pipeline.augment import Augmentation, augment
from pipeline.cells import read_cells, read_columns
from pipeline.errors import SlideError, TrainingError
from pipeline.geometry import Lattice, Roi
from pipeline.slide import Pixels
from pipeline.truth import Truth

_AHEAD = 2  # batches that are prepared or waiting to be taken
_ATTEMPTS = 20  # at a patch that cannot be read, each at another place, until the slides are given up
_AUGMENTING = 1  # tells a patch's second random stream from its first; numpy takes a 0 at the end of a seed for nothing

_Read = TypeVar("_Read")

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
class Shown:
    """What a patch is to show: a pixel of a class, in a cell of its slide's lattice."""

    slide_id: str
    cell: Roi
    class_index: int


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

    def draw(self, size: int, rng: np.random.Generator) -> Shown:
        """What a patch is to show: a class, then a slide that has it, then one of its cells, of `size` pixels.

        Classes are equally likely. A slide's chance grows with the square root of what it holds: large slides do not drown
        small ones, and a slide of one field is not seen as often as one of thirty. A cell's grows with what it holds, so
        that all pixels of the class are alike in a slide.
        """
        mass = self._slide_mass
        column = rng.choice(np.flatnonzero(mass.any(axis=0)))
        chances = np.sqrt(mass[:, column])
        slide = rng.choice(len(chances), p=chances / chances.sum())
        first, last = self._bounds[slide], self._bounds[slide + 1]
        before = self._cumulated[first, column]
        reach = before + rng.uniform() * mass[slide, column]
        cells = self._cumulated[first + 1 : last + 1, column]
        cell = first + np.searchsorted(cells, min(reach, np.nextafter(cells[-1], before)), side="right")
        x, y = self.corners[cell].tolist()
        return Shown(self.slide_ids[slide], Roi(x, y, size, size), int(column))

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

    Raises TrainingError where the table is damaged or lacks a class, or the split holds no pixel of any.
    """
    known = read_columns(path).names
    if missing := [name for name in class_names if name not in known]:
        raise _index_error(str(path), f"no column for the classes {missing}", "one for every class")
    columns = ["slide_id", "x", "y", *class_names]
    table = read_cells(path, columns, split).sort_by([(key, "ascending") for key in ("slide_id", "y", "x")])
    fractions = np.array([np.asarray(table[name]) for name in class_names], np.float64).T
    if not fractions.any():
        found = f"no known pixel of {list(class_names)} in the split {split!r}"
        raise _index_error(str(path), found, "something to learn from")
    slides = table["slide_id"].combine_chunks().dictionary_encode()
    corners = np.stack([np.asarray(table["x"]), np.asarray(table["y"])], axis=1)
    return PatchIndex(tuple(slides.dictionary.to_pylist()), slides.indices.to_numpy(), corners, fractions)


def _index_error(subject: str, found: str, expected: str) -> TrainingError:
    return TrainingError(subject, found, expected, "Check the annotations' names and the splits, then tile again.")


def patch_roi(shown: Shown, source: Source, size: int, rng: np.random.Generator, centred: bool = False) -> Roi:
    """A patch of `size` pixels, and in it one of the cell's pixels of the class: anywhere, or `centred`.

    A centred one may hang over the lattice's edge, as windows do. Any other is moved back onto it; one larger than the
    lattice is centred on it. Glass that is taught beside what was outlined has no weight in drawing a cell, but its pixels
    are drawn there as any. Raises TrainingError where the cell has no such pixel, and what the truth's `read` raises.
    """
    cell = shown.cell
    pixels = np.flatnonzero(source.truth.read(cell, source.lattice) == shown.class_index)
    if not len(pixels):
        found = f"no pixel of class {shown.class_index} in the tile at {cell.x}, {cell.y}"
        remedy = "Delete `tiles.parquet` in the output, then tile again: it was counted of other annotations, or otherwise."
        raise TrainingError(shown.slide_id, found, "one, as the table of tiles has it", remedy)
    row, column = divmod(int(rng.choice(pixels)), cell.width)
    left, top = (size // 2, size // 2) if centred else rng.integers(size, size=2).tolist()
    roi = Roi(cell.x + column - left, cell.y + row - top, size, size)
    return roi if centred else _moved_onto(source.lattice, roi)


def first_read(read: Callable[[int], _Read]) -> _Read:
    """What the first attempt, of which `read` is told the number, can read. Raises SlideError where none can."""
    for attempt in range(_ATTEMPTS):
        try:
            return read(attempt)
        except SlideError as error:
            unreadable = error
    raise unreadable


def _moved_onto(lattice: Lattice, roi: Roi) -> Roi:
    return Roi(
        _clamped(roi.x, lattice.width - roi.width), _clamped(roi.y, lattice.height - roi.height), roi.width, roi.height
    )


def _clamped(start: int, limit: int) -> int:
    return min(max(start, 0), limit) if limit > 0 else limit // 2


@dataclass(frozen=True)
class PatchStream:
    """An endless stream of augmented patches for every epoch, of `size` pixels, prepared by a number of threads.

    `centred` ones have a pixel of the class that is drawn at their centre, for a network that is told that one alone; as
    they are augmented it moves by `elastic_px` at most, and by the pixel that a mirrored centre lies beside it. `unread`
    gathers the slides of which a patch could not be read.
    """

    index: PatchIndex
    sources: Mapping[str, Source]
    augmentation: Augmentation
    size: int
    seed: int
    threads: int
    centred: bool = False
    unread: set[str] = field(default_factory=set)

    def patch(self, epoch: int, position: int) -> Patch:
        """One patch of the stream: depends on nothing but the seed, the epoch and the position.

        Raises SlideError where one attempt after the other meets what cannot be read.
        """
        rng = np.random.default_rng([self.seed, epoch, position, _AUGMENTING])
        return augment(*self._read(epoch, position), rng, self.augmentation, self.size)

    def place(self, epoch: int, position: int, attempt: int = 0) -> tuple[str, Roi]:
        """The slide of one patch, and the rectangle of its lattice; each attempt gives another."""
        again = [_AUGMENTING + attempt] if attempt else []  # which is no other stream's
        rng = np.random.default_rng([self.seed, epoch, position, *again])
        shown = self.index.draw(self.size, rng)
        return shown.slide_id, patch_roi(shown, self.sources[shown.slide_id], self.size, rng, self.centred)

    def _read(self, epoch: int, position: int) -> Patch:
        """The pixels of a patch with those around it that augmenting takes: of the first attempt that can be read."""

        def read(attempt: int) -> Patch:
            slide_id, roi = self.place(epoch, position, attempt)
            try:
                return self.sources[slide_id].read(roi.grow(self.augmentation.margin(self.size)))
            except SlideError:
                self.unread.add(slide_id)
                raise

        return first_read(read)

    def batches(self, epoch: int, positions: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """The patches at `positions`, in that order.

        Each batch has `batch_size` patches, the last what remains. Threads work two batches ahead of the caller; they end
        with the iterator, also where it is closed or dropped early. What a thread raises is raised here, in its turn.
        """
        patches = ahead(partial(self.patch, epoch), positions, _AHEAD * batch_size + 1, self.threads)
        while batch := [patch for _, patch in islice(patches, batch_size)]:
            yield np.stack([image for image, _ in batch]), np.stack([mask for _, mask in batch])

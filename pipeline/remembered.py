"""Slides and truths that are read again and again, kept in memory at the one scale at which they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.errors import SlideError
from pipeline.geometry import Lattice, Roi
from pipeline.patches import Source
from pipeline.slide import Pixels
from pipeline.truth import Truth

_MOST_BYTES = 1 << 30
_PIXEL_BYTES = 4  # red, green, blue and the class
_BLOCK = 256  # pixels along a side of what is read and kept at once


def remembered(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The same sources, which are read from disk and filled in but once, if all of them fit into 1 GiB; else as they are.

    Reads are tile-invariant, so that the bytes are the same either way.
    """
    if sum(_bytes(source.lattice) for source in sources.values()) > _MOST_BYTES:
        return dict(sources)
    return {name: _remembered(source) for name, source in sources.items()}


def _bytes(lattice: Lattice) -> int:
    """What all blocks take, with those round the lattice, over which patches may hang."""
    return _PIXEL_BYTES * _BLOCK**2 * math.prod(-(-size // _BLOCK) + 2 for size in lattice.shape)


def _remembered(source: Source) -> Source:
    return replace(
        source,
        slide=Remembered(source.slide, source.lattice),
        truth=RememberedTruth(source.truth, Remembered(source.truth, source.lattice)),
    )


@dataclass(frozen=True)
class Remembered:
    """What `origin`, a slide or its truth, gives on one lattice, in blocks that are kept as they are first read."""

    origin: Pixels
    lattice: Lattice
    _blocks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """As the origin reads; only what is on the one lattice is kept. Raises SlideError where the origin does so."""
        if lattice != self.lattice or not roi.area:
            return self.origin.read(roi, lattice)
        rows = range(roi.y // _BLOCK, -(-roi.bottom // _BLOCK))
        columns = range(roi.x // _BLOCK, -(-roi.right // _BLOCK))
        try:
            parts = [[self._part(Roi(x * _BLOCK, y * _BLOCK, _BLOCK, _BLOCK), roi) for x in columns] for y in rows]
        except SlideError:  # the damage may be elsewhere in a block
            return self.origin.read(roi, lattice)
        return np.concatenate([np.concatenate(row, axis=1) for row in parts])

    def _part(self, block: Roi, roi: Roi) -> np.ndarray:
        """What a block holds of a rectangle."""
        found = self._blocks.get((block.x, block.y))
        if found is None:
            found = self._blocks[block.x, block.y] = self.origin.read(block, self.lattice)
        return found[block.intersect(roi).within(block).slices()]


@dataclass(frozen=True)
class RememberedTruth:
    """A truth whose pixels are remembered; everything else of it is the truth's own."""

    truth: Truth
    pixels: Remembered

    @property
    def base(self) -> Lattice:
        """See Truth.base."""
        return self.truth.base

    @property
    def remarks(self) -> tuple[str, ...]:
        """See Truth.remarks."""
        return self.truth.remarks

    def known_roi(self) -> Roi:
        """See Truth.known_roi."""
        return self.truth.known_roi()

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See Truth.read."""
        return self.pixels.read(roi, lattice)

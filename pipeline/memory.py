"""Slides that are read again and again, kept in memory at the one scale at which they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.geometry import Lattice, Roi
from pipeline.patches import Source
from pipeline.slide import Pixels

_MOST_BYTES = 1 << 30
_BLOCK = 256  # pixels along a side of what is read and kept at once


def remembered(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The same sources, whose pixels are read from disk but once, if all of them fit into 1 GiB; else as they are.

    Reads are tile-invariant, so that the bytes are the same either way.
    """
    size = sum(3 * source.lattice.roi.area for source in sources.values())
    if size > _MOST_BYTES:
        return dict(sources)
    return {name: replace(source, slide=Remembered(source.slide, source.lattice)) for name, source in sources.items()}


@dataclass(frozen=True)
class Remembered:
    """The pixels of a slide on one lattice, in blocks that are kept as they are first read."""

    slide: Pixels
    lattice: Lattice
    _blocks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """Pixels as `Slide.read` gives them; only those of the one lattice are kept."""
        if lattice != self.lattice:
            return self.slide.read(roi, lattice)
        pixels = np.empty((*roi.shape, 3), np.uint8)
        for y in range(roi.y // _BLOCK, -(-roi.bottom // _BLOCK)):
            for x in range(roi.x // _BLOCK, -(-roi.right // _BLOCK)):
                block = Roi(x * _BLOCK, y * _BLOCK, _BLOCK, _BLOCK)
                common = block.intersect(roi)
                pixels[common.within(roi).slices()] = self._block(block)[common.within(block).slices()]
        return pixels

    def _block(self, block: Roi) -> np.ndarray:
        found = self._blocks.get((block.x, block.y))
        if found is None:
            found = self._blocks[block.x, block.y] = self.slide.read(block, self.lattice)
        return found

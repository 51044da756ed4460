"""The labels of a whole slide on disk, of which the part that was not examined takes no room.

They are kept inverted: IGNORED, 255, becomes the 0 of which a sparse file is full. 131072 x 131072 labels would be 16 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.classes import IGNORED
from pipeline.geometry import Roi

BAND = 1024
"""Rows that are compared at once."""

Rows = Callable[[int, int], np.ndarray]
"""Labels, (rows, columns) uint8, of the rows from the first number up to the second; IGNORED where not examined."""


@dataclass(frozen=True, eq=False)
class Labels:
    """A file of labels, (rows, columns) uint8, IGNORED where nothing was written."""

    inverted: np.ndarray

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int]) -> Labels:
        """A file in which nothing is written."""
        return cls(np.lib.format.open_memmap(path, "w+", np.uint8, shape))

    @classmethod
    def open(cls, path: Path) -> Labels:
        """A file that exists, read-only."""
        return cls(np.load(path, mmap_mode="r"))

    def write(self, roi: Roi, labels: np.ndarray) -> None:
        """Write a rectangle of labels of any integer type."""
        self.inverted[roi.slices()] = ~labels.astype(np.uint8)

    def read(self, roi: Roi) -> np.ndarray:
        """The labels of a rectangle."""
        return ~np.asarray(self.inverted[roi.slices()])

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """See Rows."""
        return ~np.asarray(self.inverted[top:bottom])


def differing(found: Rows, reference: Labels) -> float:
    """The share, 0 to 1, of labels that are not the reference's, where both are there."""
    differ = known = 0
    height = len(reference.inverted)
    for top in range(0, height, BAND):
        expected = reference.rows(top, min(top + BAND, height))
        if (expected != IGNORED).any():
            labels = found(top, top + len(expected))
            both = (expected != IGNORED) & (labels != IGNORED)
            known += int(both.sum())
            differ += int((labels != expected)[both].sum())
    return differ / max(known, 1)

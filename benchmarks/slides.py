"""Slides to measure with, of any size: real texture where there is tissue, white glass elsewhere, never whole in memory.

    texture 512 x 512 --mirrored--> cell 1024 x 1024 --repeated over the cells that are tissue--> pyramidal JPEG TIFF

Cells repeat, so that each level has few tiles that differ: each is encoded but once, and a slide of 17 gigapixels is written
at the disk's speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from scipy import ndimage
from skimage.data import immunohistochemistry

from pipeline.files import replacing

CELL = 1024
"""Pixels along a side of the squares that are all tissue or all glass."""

MPP = 0.5
_TILE = 256
_SMALLEST = 512  # pixels along the long side of the last level, at most
_GLASS = 245
_QUALITY = 88
_NOISE = 8  # knots a side of the relief whose highest part is tissue: some blobs, of one shape at every size


def make_slide(folder: Path, size: int, share: float) -> Path:
    """The path of a square slide of `size` pixels a side, a multiple of CELL, with a share of tissue, 0 to 1.

    It is made if it is not there.
    """
    path = folder / f"{size}px-{share:.0%}.tiff".replace("%", "pc")
    if not path.exists():
        write_slide(blobs(size // CELL, share), path)
    return path


def blobs(side: int, share: float) -> np.ndarray:
    """(side, side) bool: the cells that are tissue, in blobs that have one shape at every size."""
    rough = ndimage.gaussian_filter(np.random.default_rng(3).random((_NOISE, _NOISE)), 1.0)
    places = (np.arange(side) + 0.5) * _NOISE / side - 0.5
    relief = ndimage.map_coordinates(rough, np.meshgrid(places, places, indexing="ij"), order=1, mode="nearest")
    highest = np.argsort(-relief, axis=None, kind="stable")[: max(round(share * side**2), 1)]
    tissue = np.zeros(side**2, bool)
    tissue[highest] = True
    return tissue.reshape(side, side)


def texture() -> np.ndarray:
    """A cell of tissue, (CELL, CELL, 3) uint8 RGB, which continues itself on every side."""
    picture = immunohistochemistry()
    wide = np.concatenate([picture, picture[:, ::-1]], axis=1)
    return np.concatenate([wide, wide[::-1]], axis=0)


def write_slide(tissue: np.ndarray, path: Path) -> None:
    """Write a slide of CELL pixels for each value of `tissue`, (rows, columns) bool, as a tiled, pyramidal JPEG TIFF."""
    height, width = (CELL * cells for cells in tissue.shape)
    with replacing(path) as unfinished, tifffile.TiffWriter(unfinished, bigtiff=True) as writer:
        level, cell = 0, texture()
        while True:
            writer.write(
                _Level(tissue, cell).tiles(),
                shape=(height >> level, width >> level, 3),
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                subfiletype=int(level > 0),
                resolution=(1e4 / MPP / 2**level, 1e4 / MPP / 2**level),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
            if max(height, width) >> level <= _SMALLEST or len(cell) == 1:
                break
            level, cell = level + 1, _halved(cell)


@dataclass(frozen=True, eq=False)
class _Level:
    """One level of a slide: which cells are tissue, and what a cell of tissue looks like, (side, side, 3) uint8."""

    tissue: np.ndarray
    cell: np.ndarray
    encoded: dict[tuple[int, int, bytes], bytes] = field(default_factory=dict)

    def tiles(self) -> Iterator[bytes]:
        """JPEGs, row by row."""
        height, width = (len(self.cell) * cells for cells in self.tissue.shape)
        for y in range(0, height, _TILE):
            for x in range(0, width, _TILE):
                yield self._tile(y, x)

    def _tile(self, y: int, x: int) -> bytes:
        side = len(self.cell)
        rows, columns = ((start + np.arange(_TILE)) // side for start in (y, x))
        height, width = self.tissue.shape  # past the slide its last cells are repeated
        under = self.tissue[np.ix_(np.minimum(np.unique(rows), height - 1), np.minimum(np.unique(columns), width - 1))]
        key = (y % side, x % side, under.tobytes()) if under.any() else (0, 0, b"")
        if key not in self.encoded:
            pixels = self.cell[np.ix_((y + np.arange(_TILE)) % side, (x + np.arange(_TILE)) % side)]
            shown = under[np.ix_(rows - rows[0], columns - columns[0])][..., None]
            self.encoded[key] = bytes(
                imagecodecs.jpeg8_encode(
                    np.where(shown, pixels, np.uint8(_GLASS)),
                    level=_QUALITY,
                    colorspace="RGB",
                    outcolorspace="YCBCR",
                    subsampling="444",
                )
            )
        return self.encoded[key]


def _halved(cell: np.ndarray) -> np.ndarray:
    side = len(cell) // 2
    means = cell.reshape(side, 2, side, 2, 3).mean(axis=(1, 3))
    return np.asarray(np.rint(means), np.uint8)

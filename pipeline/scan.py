"""An open scan file: OpenSlide's handle, and the tiles that need none. The only importer of openslide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from pipeline.errors import SlideError
from pipeline.geometry import Lattice, Roi
from pipeline.jpeg_tiles import JpegLevel, jpeg_levels

READABLE = "a scan of a format that OpenSlide reads"
"""What every error about a file that cannot be opened expects."""

VENDOR, OBJECTIVE, QUICKHASH = (
    openslide.PROPERTY_NAME_VENDOR,
    openslide.PROPERTY_NAME_OBJECTIVE_POWER,
    openslide.PROPERTY_NAME_QUICKHASH1,
)
DESCRIPTION = "tiff.ImageDescription"
MPP = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
"""Names of a scan's properties."""

_TIFFS = ("aperio", "generic-tiff")  # whose pixels OpenSlide takes from the tiles as they are
_BLOCK = 64  # level pixels: side of what is drawn at once where a place may be fractional
_COLOURFUL = 16  # grey levels between the channels of a pixel
_CACHE = openslide.OpenSlideCache(1 << 25)  # of all slides together: each would else have as much of its own


@dataclass
class Scan:
    """A scan that is opened when first needed, and again after a failure; what is open does not travel between processes.

    `tiles` are the levels that may be decoded without OpenSlide, None before they are looked for. They are `proven` once a
    read, or the middle of it, was the same both ways and had colours in it; one that differs is dropped.
    """

    path: Path
    opened: openslide.OpenSlide | None = None
    tiles: dict[int, JpegLevel] | None = None
    proven: set[int] = field(default_factory=set)

    def get(self) -> openslide.OpenSlide:
        """OpenSlide's handle. Raises SlideError where the file is of no known format, or damaged."""
        try:
            return self._get()
        except openslide.OpenSlideUnsupportedFormatError as error:
            found = "a file of no known format, or a part of one"
            remedy = "Copy it again if it is incomplete, else convert it to a pyramidal TIFF."
            raise SlideError(str(self.path), found, READABLE, remedy) from error
        except openslide.OpenSlideError as error:
            if "nsupported" in str(error):  # such as a TIFF of JPEG 2000 tiles
                remedy = "Convert it to a pyramidal TIFF with JPEG or Deflate."
                raise SlideError(str(self.path), f"what OpenSlide does not read ({error})", READABLE, remedy) from error
            remedy = "Copy it again from its source."
            raise SlideError(str(self.path), f"a damaged file ({error})", READABLE, remedy) from error

    def draw(self, level: int, roi: Roi, downsample: float) -> np.ndarray:
        """RGB of `roi`, in pixels of the level, as OpenSlide draws it. Raises SlideError where it cannot be read."""
        try:
            fetch = _fetch if downsample == round(downsample) else _fetch_in_blocks
            return fetch(self._get(), level, roi, downsample)
        except (openslide.OpenSlideError, OSError) as error:
            self.opened = None
            place = f"x {roi.x}, y {roi.y}, {roi.width} x {roi.height} px of level {level}"
            found, remedy = f"a read error at {place} ({error})", "The file is damaged: copy it again."
            raise SlideError(str(self.path), found, "pixels", remedy) from error

    def tiles_of(self, level: int, levels: Sequence[Lattice], vendor: str) -> JpegLevel | None:
        """The tiles of a level, where they may be decoded without OpenSlide."""
        if self.tiles is None:
            self.tiles = jpeg_levels(self.path, levels) if vendor in _TIFFS else {}
        return self.tiles.get(level)

    def judge(self, level: int, decoded: np.ndarray, drawn: np.ndarray) -> None:
        """Hold what the tiles of a level gave against what OpenSlide drew."""
        if not np.array_equal(decoded, drawn):
            (self.tiles or {}).pop(level, None)
            return
        high, low = channel_range([drawn[..., channel] for channel in range(3)])
        if (high - low).max(initial=0) > _COLOURFUL:
            self.proven.add(level)

    def _get(self) -> openslide.OpenSlide:
        if self.opened is None:
            self.opened = openslide.OpenSlide(str(self.path))
            self.opened.set_cache(_CACHE)
        return self.opened

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "opened": None, "tiles": None, "proven": set()}


def channel_range(planes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The highest and the lowest of three colours, pixel by pixel: numpy is slow over a short last axis."""
    red, green, blue = planes
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def _fetch(handle: openslide.OpenSlide, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """One rectangle of a level as RGB over white."""
    location = (round(roi.x * downsample), round(roi.y * downsample))
    picture = handle.read_region(location, level, (roi.width, roi.height))
    if picture.getchannel("A").getextrema() != (255, 255):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _fetch_in_blocks(handle: openslide.OpenSlide, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """The same from blocks at fixed places, since OpenSlide's rounding of a fractional place depends on the place."""
    pixels = np.empty((*roi.shape, 3), np.uint8)
    for y in range(roi.y // _BLOCK * _BLOCK, roi.bottom, _BLOCK):
        for x in range(roi.x // _BLOCK * _BLOCK, roi.right, _BLOCK):
            block = Roi(x, y, _BLOCK, _BLOCK)
            common = block.intersect(roi)
            fetched = _fetch(handle, level, block, downsample)
            pixels[common.within(roi).slices()] = fetched[common.within(block).slices()]
    return pixels

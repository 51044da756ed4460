"""Pixels of one level of a scan, as OpenSlide draws them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.geometry import Roi

_BLOCK = 64  # level pixels


class Handle(Protocol):
    """A file that is open, as OpenSlide hands it out."""

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """RGBA of `size` pixels of a level, from a place of the finest one."""


def fetch(handle: Handle, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """One rectangle of a level as RGB over white."""
    location = (round(roi.x * downsample), round(roi.y * downsample))
    picture = handle.read_region(location, level, (roi.width, roi.height))
    if picture.getchannel("A").getextrema() != (255, 255):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def fetch_in_blocks(handle: Handle, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """The same from blocks at fixed places, since OpenSlide's rounding of a fractional place depends on the place."""
    pixels = np.empty((*roi.shape, 3), np.uint8)
    for y in range(roi.y // _BLOCK * _BLOCK, roi.bottom, _BLOCK):
        for x in range(roi.x // _BLOCK * _BLOCK, roi.right, _BLOCK):
            block = Roi(x, y, _BLOCK, _BLOCK)
            common = block.intersect(roi)
            fetched = fetch(handle, level, block, downsample)
            pixels[common.within(roi).slices()] = fetched[common.within(block).slices()]
    return pixels

"""Where things are: scales, regions and lattices. The only place where x becomes a column.

Every lattice of a slide starts at the slide's top-left corner; pixel (i, j) of a lattice covers
[i, i+1) x [j, j+1) times its mpp, in micrometres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MPP_RANGE = (0.05, 20.0)
"""Micrometres per pixel that a scan, or a model, can have."""

_SLACK = 1e-6  # pixels: rounding noise of a product of floats, not a part of a pixel


@dataclass(frozen=True)
class Mpp:
    """Micrometres per pixel along x and y."""

    x: float
    y: float

    @classmethod
    def square(cls, value: float) -> Mpp:
        """The same scale along both axes."""
        return cls(value, value)

    @property
    def area_um2(self) -> float:
        """Area of one pixel, in square micrometres."""
        return self.x * self.y


@dataclass(frozen=True)
class Roi:
    """A half-open rectangle of integer pixels: x <= column < x + width, y <= row < y + height."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """First column past the rectangle."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row past the rectangle."""
        return self.y + self.height

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as arrays have it."""
        return (self.height, self.width)

    def grow(self, pixels: int) -> Roi:
        """The rectangle with `pixels` more on each of its four sides."""
        return Roi(self.x - pixels, self.y - pixels, self.width + 2 * pixels, self.height + 2 * pixels)

    def shrink(self, factor: int) -> Roi:
        """The rectangle in pixels `factor` times as large, of which its origin must be a multiple; sizes are rounded up."""
        return Roi(self.x // factor, self.y // factor, -(-self.width // factor), -(-self.height // factor))

    def intersect(self, other: Roi) -> Roi:
        """The common rectangle; of width or height 0 where there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width, height = min(self.right, other.right) - x, min(self.bottom, other.bottom) - y
        return Roi(x, y, max(width, 0), max(height, 0))

    def within(self, other: Roi) -> Roi:
        """The same rectangle, counted from the top-left corner of `other`."""
        return Roi(self.x - other.x, self.y - other.y, self.width, self.height)

    def slices(self) -> tuple[slice, slice]:
        """(rows, columns) that index this rectangle in an array."""
        return slice(self.y, self.bottom), slice(self.x, self.right)


@dataclass(frozen=True)
class Lattice:
    """A grid of pixels from a slide's top-left corner: `width` x `height` pixels of `mpp`."""

    width: int
    height: int
    mpp: Mpp

    @property
    def roi(self) -> Roi:
        """All of it."""
        return Roi(0, 0, self.width, self.height)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as arrays have it."""
        return (self.height, self.width)

    def at(self, mpp: Mpp) -> Lattice:
        """The lattice of pixels of `mpp` that covers the same area; its last pixels may reach past it."""
        width = math.ceil(self.width * self.mpp.x / mpp.x - _SLACK)
        height = math.ceil(self.height * self.mpp.y / mpp.y - _SLACK)
        return Lattice(max(width, 1), max(height, 1), mpp)

    def seen(self, mpp: Mpp, longest: int) -> Lattice:
        """The lattice `at` a scale, or at one as much coarser as it takes to have `longest` pixels along the longer side."""
        shrink = max(max(self.at(mpp).shape) / longest, 1)
        return self.at(Mpp(mpp.x * shrink, mpp.y * shrink))

    def shrink(self, factor: int) -> Lattice:
        """The lattice of pixels `factor` times as large; its last pixels may reach past this one's."""
        mpp = Mpp(self.mpp.x * factor, self.mpp.y * factor)
        return Lattice(-(-self.width // factor), -(-self.height // factor), mpp)

    def scale_to(self, other: Lattice) -> tuple[float, float]:
        """(x, y) factors that turn this lattice's coordinates into those of `other`."""
        return self.mpp.x / other.mpp.x, self.mpp.y / other.mpp.y

    def cover(self, roi: Roi, other: Lattice) -> Roi:
        """The smallest rectangle of `other` that covers `roi` of this lattice: rounded outward, not clipped."""
        scale_x, scale_y = self.scale_to(other)
        left, top = math.floor(roi.x * scale_x + _SLACK), math.floor(roi.y * scale_y + _SLACK)
        right, bottom = math.ceil(roi.right * scale_x - _SLACK), math.ceil(roi.bottom * scale_y - _SLACK)
        return Roi(left, top, max(right - left, 1), max(bottom - top, 1))

"""A whole-slide scan: what it says of itself, and its pixels at any scale.

A read is *tile-invariant*: a region read at once or in pieces gives the same bytes. Every pixel is therefore sampled at a
place that depends on its own index alone, in integer arithmetic, from level pixels that are the same however fetched.
"""

from __future__ import annotations

import hashlib
import math
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import ScaleError, SlideError
from pipeline.files import Stamp, file_stamp
from pipeline.geometry import MPP_RANGE, Lattice, Mpp, Roi
from pipeline.ome_channels import pages_of_channels
from pipeline.sampling import resample_columns, resample_rows, sampling
from pipeline.scan import DESCRIPTION, MPP, OBJECTIVE, QUICKHASH, READABLE, VENDOR, Scan

_LEVEL_TOLERANCE = 1.01  # a level may be this much coarser than asked: reading a finer one costs four times the pixels
_FRACTIONAL_COST = 8  # times the cost of a pixel at a whole downsample, roughly
_MOST_PIXELS = 1 << 25  # level pixels in memory at once: a scan without a pyramid is no trap
_DIGEST_SAMPLES, _DIGEST_BYTES = 64, 65536
_WHITE = 255
_MIDDLE = 512  # pixels a side of what is looked at first to tell whether two ways of reading agree


class Pixels(Protocol):
    """Whatever gives an array for a rectangle: a slide, or its truth."""

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See Slide.read."""


@dataclass(frozen=True)
class Slide:
    """A scan: its base lattice, its pyramid of `levels` (the first is the base), and what it says of its origin.

    `downsamples` are OpenSlide's own, one a level; `objective` is the magnification of the lens, None where not stated.
    `shown` is the part of the base that was scanned, where the scan says so (MIRAX and Leica SCN do), else all of it: QuPath
    shows nothing else, and counts pixels from its corner.
    """

    path: Path
    base: Lattice
    levels: tuple[Lattice, ...]
    downsamples: tuple[float, ...]
    vendor: str
    objective: float | None
    shown: Roi
    _scan: Scan = field(repr=False, compare=False)

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """Pixels of `roi`, a rectangle of `lattice`, resampled from the best level.

        Returns (height, width, 3) uint8 RGB. Outside the scan, and behind transparent pixels, is white glass. Pixels are
        averaged over their area where the level is finer than the lattice, and interpolated linearly where it is coarser.
        Raises SlideError where the scan cannot be read; the next read opens it anew.
        """
        level = self.best_level(lattice.mpp)
        rows = max(int(_MOST_PIXELS / (roi.width * self._seen(lattice))), 1)
        bands = (Roi(roi.x, y, roi.width, rows).intersect(roi) for y in range(roi.y, roi.bottom, rows))
        parts = [self._read_band(level, band, lattice) for band in bands]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pixels_at_once(self, roi: Roi, lattice: Lattice) -> int:
        """Level pixels that reading `roi` holds in memory at once."""
        row = roi.width * self._seen(lattice)
        return int(min(roi.height * row, max(_MOST_PIXELS, row)))

    def _seen(self, lattice: Lattice) -> float:
        """Level pixels that are read for a pixel of a lattice."""
        return math.prod(lattice.scale_to(self.levels[self.best_level(lattice.mpp)]))

    def _read_band(self, level: int, roi: Roi, lattice: Lattice) -> np.ndarray:
        scale_x, scale_y = lattice.scale_to(self.levels[level])
        x = sampling(roi.x, roi.width, scale_x, lattice.width)
        y = sampling(roi.y, roi.height, scale_y, lattice.height)
        pixels = self._read_level(level, Roi(x.start, y.start, x.length, y.length))
        return resample_columns(resample_rows(pixels, y), x)

    def best_level(self, mpp: Mpp) -> int:
        """The index of the level that gives pixels of `mpp` at the least cost, none that is coarser.

        A level costs its pixels, and about eight times as much where its downsample is no whole number: OpenSlide then draws
        every pixel between two others, which is slow and blurs it.
        """
        costs = {}
        for index, level in enumerate(self.levels):
            if index == 0 or (level.mpp.x <= mpp.x * _LEVEL_TOLERANCE and level.mpp.y <= mpp.y * _LEVEL_TOLERANCE):
                costs[index] = (1 if self._is_whole(index) else _FRACTIONAL_COST) / level.mpp.area_um2
        return min(costs, key=lambda index: costs[index])

    def digest(self) -> str:
        """A SHA-256 over the file's size, OpenSlide's quick hash and 64 samples of 64 KiB, as hexadecimal digits.

        It takes milliseconds where a full hash of a scan takes minutes. An edit of a few bytes between two samples escapes
        it, and so may one in the other files of a scan that has several (MIRAX, VMS).
        """
        size = self.path.stat().st_size
        quickhash = self._scan.get().properties.get(QUICKHASH, "")
        digest = hashlib.sha256(f"{size} {quickhash}".encode())
        with self.path.open("rb") as file:
            for start in sorted({size * k // _DIGEST_SAMPLES for k in range(_DIGEST_SAMPLES)}):
                file.seek(start)
                digest.update(file.read(_DIGEST_BYTES))
        return digest.hexdigest()

    def _is_whole(self, level: int) -> bool:
        """Whether a pixel of the level is a whole number of base pixels wide, as OpenSlide sees it."""
        downsample = self.downsamples[level]
        return downsample == round(downsample)

    def _read_level(self, level: int, roi: Roi) -> np.ndarray:
        """RGB of `roi`, in pixels of the level: from the tiles themselves where that is known to be what OpenSlide draws."""
        decoded = self._decode(level, roi)
        if decoded is None:
            return self._draw(level, roi)
        if level not in self._scan.proven:
            middle = _middle(roi)
            self._scan.judge(
                level, decoded[middle.within(roi).slices()], self._scan.draw(level, middle, self.downsamples[level])
            )
        if level in self._scan.proven:
            return decoded
        drawn = self._draw(level, roi)
        self._scan.judge(level, decoded, drawn)
        return drawn

    def _decode(self, level: int, roi: Roi) -> np.ndarray | None:
        """RGB of `roi` without OpenSlide; None where that cannot be, and where it fails: OpenSlide then says why."""
        tiles = self._scan.tiles_of(level, self.levels, self.vendor) if self._is_whole(level) else None
        if tiles is None:
            return None
        inside = roi.intersect(self.levels[level].roi)
        try:
            decoded = tiles.read(inside)
        except (ValueError, LookupError, OSError, MemoryError):  # the last where a file states absurd sizes
            return None
        if inside == roi:
            return decoded
        pixels = np.full((*roi.shape, 3), _WHITE, np.uint8)
        pixels[inside.within(roi).slices()] = decoded
        return pixels

    def _draw(self, level: int, roi: Roi) -> np.ndarray:
        """RGB of `roi` as OpenSlide draws it."""
        return self._scan.draw(level, roi, self.downsamples[level])


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Open a scan of any format that OpenSlide reads; within a process, an unchanged slide that is open is shared.

    `mpp` is taken instead of the micrometres per pixel that the scan states, or does not state. Raises SlideError where the
    file is missing, of no known format, damaged or in channels of their own pages, and ScaleError where the scale is missing
    or outside 0.05 to 20.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SlideError(str(path), "a folder, or no ordinary file", READABLE, "Name the slide's own file.")
        path.open("rb").close()  # OpenSlide calls a file that may not be read one of no known format
        stamp = file_stamp(path)
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise SlideError(str(path), found, READABLE, "Correct the path, or give access to it.") from error
    return _shared_slide(path, mpp, stamp)


def fallback_mpp(path: Path, mpp: float | None) -> float | None:
    """`mpp` for a scan that states no usable scale; None for every other, one that cannot be opened included.

    Nothing is opened where `mpp` is None.
    """
    if mpp is None:
        return None
    try:
        open_slide(path)
    except ScaleError:
        return mpp
    except SlideError:
        return None
    return None


def unused_mpp(path: Path, mpp: float | None) -> str:
    """A remark where a scan states another scale than `mpp`, which `fallback_mpp` therefore leaves out; else empty."""
    if mpp is None or fallback_mpp(path, mpp) is not None:
        return ""
    with suppress(SlideError):
        base = open_slide(path).base.mpp
        stated = " x ".join(dict.fromkeys((f"{base.x:g}", f"{base.y:g}")))
        if stated != f"{mpp:g}":
            return f"states {stated} um/px, so that --mpp {mpp:g} is not used (column `mpp` of a manifest would be)"
    return ""


@lru_cache(maxsize=32)
def _shared_slide(path: Path, mpp: float | None, stamp: Stamp) -> Slide:
    scan = Scan(path)
    opened = scan.get()
    properties, (width, height) = opened.properties, opened.dimensions
    vendor = str(properties.get(VENDOR, "unknown"))
    if vendor == "generic-tiff" and (channels := pages_of_channels(path, properties.get(DESCRIPTION, ""))):
        found, remedy = f"an OME-TIFF of {channels} channels, each on a page of its own", "Write it again as RGB."
        raise SlideError(str(path), found, "pixels of three colours (fluorescence cannot be read)", remedy)
    base = Lattice(width, height, _base_mpp(path, properties, mpp))
    levels = tuple(
        Lattice(w, h, Mpp(base.mpp.x * (width / w), base.mpp.y * (height / h))) for w, h in opened.level_dimensions
    )
    objective = _number(properties.get(OBJECTIVE))
    return Slide(path, base, levels, tuple(opened.level_downsamples), vendor, objective, _shown(properties, base), scan)


def _base_mpp(path: Path, properties: Any, override: float | None) -> Mpp:
    if override is not None:
        found = Mpp.square(override)
    else:
        x, y = (_number(properties.get(name)) for name in MPP)
        if x is None or y is None:
            raise _scale_error(path, "no micrometres per pixel")
        found = Mpp(x, y)
    low, high = MPP_RANGE
    if not (low <= found.x <= high and low <= found.y <= high):
        raise _scale_error(path, f"{found.x:g} x {found.y:g} micrometres per pixel")
    return found


def _scale_error(path: Path, found: str) -> ScaleError:
    remedy = "State it in the manifest's `mpp` column (or with --mpp)."
    return ScaleError(str(path), found, "a scale of {:g} to {:g} um/px".format(*MPP_RANGE), remedy)


def _shown(properties: Any, base: Lattice) -> Roi:
    numbers = [_number(properties.get(f"openslide.bounds-{name}")) for name in ("x", "y", "width", "height")]
    known = [int(number) for number in numbers if number is not None]
    bounds = Roi(*known).intersect(base.roi) if len(known) == len(numbers) else base.roi
    return bounds if bounds.area else base.roi


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _middle(roi: Roi) -> Roi:
    x, y = (start + (size - _MIDDLE) // 2 for start, size in ((roi.x, roi.width), (roi.y, roi.height)))
    return Roi(x, y, _MIDDLE, _MIDDLE).intersect(roi)

"""A whole-slide scan: what it says of itself, and its pixels at any scale. The only importer of openslide.

A read is *tile-invariant*: a region read at once or in pieces gives the same bytes. Every pixel is therefore sampled at a
place that depends on its own index alone, in integer arithmetic, from level pixels that are the same however fetched.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide

from pipeline.errors import ScaleError, SlideError
from pipeline.fetching import fetch, fetch_in_blocks
from pipeline.geometry import MPP_RANGE, Lattice, Mpp, Roi
from pipeline.jpeg_tiles import JpegLevel, jpeg_levels
from pipeline.sampling import resample_rows, sampling

_READABLE = "a scan of a format that OpenSlide reads"
_LEVEL_TOLERANCE = 1.01  # a level may be this much coarser than asked: reading a finer one costs four times the pixels
_FRACTIONAL_COST = 8  # times the cost of a pixel at a whole downsample, roughly
_MOST_PIXELS = 1 << 25  # level pixels in memory at once: a scan without a pyramid is no trap
_DIGEST_SAMPLES, _DIGEST_BYTES = 64, 65536
_TIFFS = ("aperio", "generic-tiff")  # whose pixels OpenSlide takes from the tiles as they are
_WHITE = 255
_COLOURFUL = 16  # grey levels between the channels of a pixel
_CACHE = openslide.OpenSlideCache(1 << 25)  # of all slides together: each would else have as much of its own
_MIDDLE = 512  # pixels a side of what is looked at first to tell whether two ways of reading agree


class Pixels(Protocol):
    """Whatever shows a slide's pixels."""

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See Slide.read."""


@dataclass
class _Handle:
    """An open scan that is opened when first needed, and again after a failure; it does not travel between processes.

    `tiles` are the levels that may be decoded without OpenSlide, None before they are looked for. They are `proven` once a
    read, or the middle of it, was the same both ways and had colours in it; one that differs is dropped.
    """

    path: Path
    scan: openslide.OpenSlide | None = None
    tiles: dict[int, JpegLevel] | None = None
    proven: set[int] = field(default_factory=set)

    def get(self) -> openslide.OpenSlide:
        if self.scan is None:
            self.scan = openslide.OpenSlide(str(self.path))
            self.scan.set_cache(_CACHE)
        return self.scan

    def drop(self) -> None:
        self.scan = None

    def tiles_of(self, level: int, levels: Sequence[Lattice], vendor: str) -> JpegLevel | None:
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

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "scan": None, "tiles": None, "proven": set()}


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
    _handle: _Handle = field(repr=False, compare=False)

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

    def held(self, roi: Roi, lattice: Lattice) -> int:
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
        return resample_rows(resample_rows(pixels, y).swapaxes(0, 1), x).swapaxes(0, 1)

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
        quickhash = self._handle.get().properties.get(openslide.PROPERTY_NAME_QUICKHASH1, "")
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
        if level not in self._handle.proven:
            middle = _middle(roi)
            self._handle.judge(level, decoded[middle.within(roi).slices()], self._draw(level, middle))
        if level in self._handle.proven:
            return decoded
        drawn = self._draw(level, roi)
        self._handle.judge(level, decoded, drawn)
        return drawn

    def _decode(self, level: int, roi: Roi) -> np.ndarray | None:
        """RGB of `roi` without OpenSlide; None where that cannot be, and where it fails: OpenSlide then says why."""
        tiles = self._handle.tiles_of(level, self.levels, self.vendor) if self._is_whole(level) else None
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
        try:
            scan = self._handle.get()
            fetch_level = fetch if self._is_whole(level) else fetch_in_blocks
            return fetch_level(scan, level, roi, self.downsamples[level])
        except (openslide.OpenSlideError, OSError) as error:
            self._handle.drop()
            place = f"x {roi.x}, y {roi.y}, {roi.width} x {roi.height} px of level {level}"
            raise SlideError(
                str(self.path), f"a read error at {place} ({error})", "pixels", "The file is damaged: copy it again."
            ) from error


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Open a scan of any format that OpenSlide reads; within a process, an unchanged slide that is open is shared.

    `mpp` is taken instead of the micrometres per pixel that the scan states, or does not state. Raises SlideError where the
    file is missing, of no known format or damaged, and ScaleError where the scale is missing or outside 0.05 to 20.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SlideError(str(path), "a folder, or no ordinary file", _READABLE, "Name the slide's own file.")
        path.open("rb").close()  # OpenSlide calls a file that may not be read one of no known format
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise SlideError(str(path), found, _READABLE, "Correct the path, or give access to it.") from error
    return _shared_slide(path, mpp, (status.st_size, status.st_mtime_ns))


def channel_range(planes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The highest and the lowest of three colours, pixel by pixel: numpy is slow over a short last axis."""
    red, green, blue = planes
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def fallback_mpp(path: Path, mpp: float | None) -> float | None:
    """`mpp` for a scan that states no usable scale; None for every other, one that cannot be opened included."""
    try:
        open_slide(path)
    except ScaleError:
        return mpp
    except SlideError:
        return None
    return None


@lru_cache(maxsize=32)
def _shared_slide(path: Path, mpp: float | None, stamp: tuple[int, int]) -> Slide:
    handle = _Handle(path)
    scan = _open(handle)
    properties = scan.properties
    width, height = scan.dimensions
    base = Lattice(width, height, _base_mpp(path, properties, mpp))
    levels = tuple(Lattice(w, h, Mpp(base.mpp.x * (width / w), base.mpp.y * (height / h))) for w, h in scan.level_dimensions)
    vendor = str(properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"))
    objective = _number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    return Slide(path, base, levels, tuple(scan.level_downsamples), vendor, objective, _shown(properties, base), handle)


def _open(handle: _Handle) -> openslide.OpenSlide:
    try:
        return handle.get()
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            str(handle.path),
            "a file of no known format, or a part of one",
            _READABLE,
            "Copy it again if it is incomplete, else convert it to a pyramidal TIFF.",
        ) from error
    except openslide.OpenSlideError as error:
        if "nsupported" in str(error):  # such as a TIFF of JPEG 2000 tiles
            remedy = "Convert it to a pyramidal TIFF with JPEG or Deflate."
            raise SlideError(str(handle.path), f"what OpenSlide does not read ({error})", _READABLE, remedy) from error
        raise SlideError(
            str(handle.path), f"a damaged file ({error})", _READABLE, "Copy it again from its source."
        ) from error


def _base_mpp(path: Path, properties: Any, override: float | None) -> Mpp:
    if override is not None:
        found = Mpp.square(override)
    else:
        x = _number(properties.get(openslide.PROPERTY_NAME_MPP_X))
        y = _number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
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

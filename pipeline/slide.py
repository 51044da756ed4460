"""A whole-slide scan: what it says of itself, and its pixels at any scale. The only importer of openslide.

A read is *tile-invariant*: a region read at once or in pieces gives the same bytes. Every pixel is therefore sampled at a
place that depends on its own index alone, in integer arithmetic, from level pixels that are always fetched the same way.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
from PIL import Image
from scipy import sparse

from pipeline.errors import ScaleError, SlideError
from pipeline.geometry import MPP_RANGE, Lattice, Mpp, Roi

_READABLE = "a scan of a format that OpenSlide reads"
_LEVEL_TOLERANCE = 1.01  # a level may be this much coarser than asked: reading a finer one costs four times the pixels
_FRACTIONAL_COST = 8  # times the cost of a pixel at a whole downsample, roughly
_MOST_PIXELS = 1 << 25  # level pixels in memory at once: a scan without a pyramid is no trap
_SNAP = 0.05  # pixels of drift over a whole slide below which a scale counts as a whole number
_BLOCK = 64  # level pixels; a level with a fractional downsample is fetched in such blocks
_WEIGHT_BITS = 8  # 255 * 2**8 and its rounding still fit in 16 bits
_DIGEST_SAMPLES, _DIGEST_BYTES = 64, 65536


class Pixels(Protocol):
    """Whatever shows a slide's pixels."""

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See Slide.read."""


@dataclass
class _Handle:
    """An open scan that is opened when first needed, and again after a failure; it does not travel between processes."""

    path: Path
    scan: openslide.OpenSlide | None = None

    def get(self) -> openslide.OpenSlide:
        if self.scan is None:
            self.scan = openslide.OpenSlide(str(self.path))
        return self.scan

    def drop(self) -> None:
        self.scan = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "scan": None}


@dataclass(frozen=True)
class Slide:
    """A scan: its base lattice, its pyramid of `levels` (the first is the base), and what it says of its origin.

    `downsamples` are OpenSlide's own, one a level; `objective` is the magnification of the lens, None where not stated.
    """

    path: Path
    base: Lattice
    levels: tuple[Lattice, ...]
    downsamples: tuple[float, ...]
    vendor: str
    objective: float | None
    _handle: _Handle = field(repr=False, compare=False)

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """Pixels of `roi`, a rectangle of `lattice`, resampled from the best level.

        Returns (height, width, 3) uint8 RGB. Outside the scan, and behind transparent pixels, is white glass. Pixels are
        averaged over their area where the level is finer than the lattice, and interpolated linearly where it is coarser.
        Raises SlideError where the scan cannot be read; the next read opens it anew.
        """
        level = self.best_level(lattice.mpp)
        scale_x, scale_y = lattice.scale_to(self.levels[level])
        rows = max(int(_MOST_PIXELS / (roi.width * scale_x * scale_y)), 1)
        bands = (Roi(roi.x, y, roi.width, rows).intersect(roi) for y in range(roi.y, roi.bottom, rows))
        parts = [self._read_band(level, band, lattice) for band in bands]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_band(self, level: int, roi: Roi, lattice: Lattice) -> np.ndarray:
        scale_x, scale_y = lattice.scale_to(self.levels[level])
        x = _sampling(roi.x, roi.width, scale_x, lattice.width)
        y = _sampling(roi.y, roi.height, scale_y, lattice.height)
        pixels = self._read_level(level, Roi(x.start, y.start, x.length, y.length))
        return _resample_rows(_resample_rows(pixels, y).swapaxes(0, 1), x).swapaxes(0, 1)

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
        """RGB of `roi`, in pixels of the level."""
        try:
            scan = self._handle.get()
            fetch = _fetch if self._is_whole(level) else _fetch_in_blocks
            return fetch(scan, level, roi, self.downsamples[level])
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
    if not path.is_file():
        raise SlideError(str(path), "no such file", _READABLE, "Correct the path.")
    status = path.stat()
    return _shared_slide(path, mpp, (status.st_size, status.st_mtime_ns))


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
    return Slide(path, base, levels, tuple(scan.level_downsamples), vendor, objective, handle)


def _open(handle: _Handle) -> openslide.OpenSlide:
    try:
        return handle.get()
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            str(handle.path), "a file of no known format", _READABLE, "Convert it to a pyramidal TIFF."
        ) from error
    except openslide.OpenSlideError as error:
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


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fetch(scan: openslide.OpenSlide, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """One rectangle of a level as RGB over white."""
    location = (round(roi.x * downsample), round(roi.y * downsample))
    picture = scan.read_region(location, level, (roi.width, roi.height))
    if picture.getchannel("A").getextrema() != (255, 255):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _fetch_in_blocks(scan: openslide.OpenSlide, level: int, roi: Roi, downsample: float) -> np.ndarray:
    """The same from blocks at fixed places, since OpenSlide's rounding of a fractional place depends on the place."""
    pixels = np.empty((*roi.shape, 3), np.uint8)
    for y in range(roi.y // _BLOCK * _BLOCK, roi.bottom, _BLOCK):
        for x in range(roi.x // _BLOCK * _BLOCK, roi.right, _BLOCK):
            block = Roi(x, y, _BLOCK, _BLOCK)
            common = block.intersect(roi)
            fetched = _fetch(scan, level, block, downsample)
            pixels[common.within(roi).slices()] = fetched[common.within(block).slices()]
    return pixels


@dataclass(frozen=True)
class _Sampling:
    """How the pixels of one axis are made: `weights` @ source / 2**8, for source pixels from `start` on.

    `weights` is a sparse (pixels, source pixels) matrix of uint16 whose rows sum to 2**8.
    """

    start: int
    weights: sparse.csr_array

    @property
    def length(self) -> int:
        """Number of source pixels."""
        return int(self.weights.shape[1])


def _sampling(start: int, count: int, scale: float, lattice_size: int) -> _Sampling:
    """Sampling of pixels start ... start + count - 1 of an axis, each `scale` source pixels wide."""
    if abs(scale - round(scale)) * lattice_size < _SNAP and round(scale) >= 1:
        scale = float(round(scale))
    index = np.arange(start, start + count)
    if scale >= 1:
        low, high = index * scale, (index + 1) * scale
        taps = math.ceil(scale) + (0 if scale == round(scale) else 1)
    else:
        low = (index + 0.5) * scale - 0.5
        high, taps = low + 1, 2
    first = np.floor(low + 1e-9).astype(np.int64)
    edges = first[:, None] + np.arange(taps + 1)
    overlap = np.diff(np.clip(edges, low[:, None], high[:, None]), axis=1)
    weights = _whole_weights(overlap / overlap.sum(axis=1, keepdims=True))
    origin = int(first[0])
    columns = first[:, None] - origin + np.arange(taps)
    rows = np.arange(0, count * taps + 1, taps)
    matrix = sparse.csr_array((weights.ravel(), columns.ravel(), rows), shape=(count, int(first[-1]) + taps - origin))
    matrix.eliminate_zeros()
    return _Sampling(origin, matrix)


def _whole_weights(weights: np.ndarray) -> np.ndarray:
    """Weights as whole 256ths whose sum is exactly 256; the largest takes what rounding leaves."""
    whole = np.rint(weights * (1 << _WEIGHT_BITS)).astype(np.int64)
    rows = np.arange(len(whole))
    whole[rows, whole.argmax(axis=1)] += (1 << _WEIGHT_BITS) - whole.sum(axis=1)
    return np.asarray(whole, np.uint16)


def _resample_rows(pixels: np.ndarray, sampling: _Sampling) -> np.ndarray:
    """Weighted sums of rows, (source rows, columns, 3) to (rows, columns, 3) uint8, in whole numbers: no rounding noise."""
    rows, sources = sampling.weights.shape
    if rows == sources == sampling.weights.nnz:
        return pixels
    total = sampling.weights @ pixels.reshape(sources, -1).astype(np.uint16)
    total += 1 << (_WEIGHT_BITS - 1)
    total >>= _WEIGHT_BITS
    return np.asarray(total, np.uint8).reshape(rows, *pixels.shape[1:])

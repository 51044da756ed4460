"""Which part of a slide is tissue, judged from a low-power view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import filters

from pipeline.ahead import ahead
from pipeline.components import find_runs
from pipeline.files import replacing
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.machine import threads
from pipeline.scan import channel_range
from pipeline.settings import TissueSettings
from pipeline.slide import Slide

_GLASS_BRIGHTNESS = 215  # of 255: glass is not darker than this
_GLASS_TINT = 20  # of 255: glass is not more coloured than this
_FAINTEST, _FIRMEST = 0.035, 0.09  # bounds of the threshold on stain: below is noise, above is surely stained
_BLACK = 70  # of 255: brightest channel of ink and of the scanner's border
_BLACK_CHROMA = 35  # of 255: ink and border are grey; dark nuclei are blue
_PEN_SATURATION = 0.42
_SMOOTHING_UM, _TRUNCATED = 12.0, 4.0  # standard deviation of a Gaussian, and how many of them it reaches
_SPECK, _GROWN = 15, 2  # pixels: ink is more than that, with such a margin round it
_SURVEYED = 1024  # pixels along the longer side of the view that tells a slide's glass and its threshold
_BAND_PIXELS = 1 << 19  # looked at together: a few arrays of them stay small
_MOST_HELD = 5 << 24  # level pixels of all bands that are looked at side by side: some 600 MiB
_AS_MANY = 8  # level pixels take as much memory as what is made of a pixel of a band


@dataclass(frozen=True)
class Tissue:
    """A mask, (rows, columns) bool, of the pixels of `lattice` that show tissue."""

    mask: np.ndarray
    lattice: Lattice

    def fraction(self, roi: Roi, lattice: Lattice) -> float:
        """The share of tissue, 0 to 1, under a rectangle of another lattice of the same slide."""
        inside = lattice.cover(roi, self.lattice).intersect(self.lattice.roi)
        return float(self.mask[inside.slices()].mean()) if inside.area else 0.0

    def sampled(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """(rows, columns) bool: whether the centre of each pixel of a rectangle of another lattice lies on tissue.

        A pixel outside the slide is as the nearest one inside.
        """
        lines, times, columns = _nearest(roi, lattice, self.lattice)
        return np.repeat(self.mask[np.ix_(lines, columns)], times, axis=0)

    def save(self, path: Path) -> None:
        """Write it as an NPZ file, whole or not at all; eight pixels take a byte."""
        with replacing(path) as partial, partial.open("wb") as file:
            mpp = self.lattice.mpp
            np.savez(file, mask=np.packbits(self.mask), shape=self.mask.shape, mpp=(mpp.x, mpp.y))

    @classmethod
    def load(cls, path: Path) -> Tissue:
        """Read what `save` wrote. Raises FileNotFoundError where there is no such file."""
        with np.load(path) as file:
            (height, width), mpp = file["shape"].tolist(), Mpp(*file["mpp"].tolist())
            mask = np.unpackbits(file["mask"], count=height * width).view(bool).reshape(height, width)
            return cls(mask, Lattice(width, height, mpp))

    def area_um2(self, base: Lattice) -> float:
        """Area of the tissue in square micrometres; of pixels that reach past the slide, `base`, the part on it."""
        mpp = self.lattice.mpp
        past_x = self.lattice.width * mpp.x - base.width * base.mpp.x
        past_y = self.lattice.height * mpp.y - base.height * base.mpp.y
        widths = np.count_nonzero(self.mask, axis=1) * mpp.x - self.mask[:, -1] * past_x
        return float(widths.sum() * mpp.y - widths[-1] * past_y)


@dataclass(frozen=True)
class PackedTissue:
    """Tissue of one of many slides that are held at once: in `bits`, (rows, columns / 8, rounded up) uint8, eight pixels
    take a byte.
    """

    bits: np.ndarray
    lattice: Lattice

    @classmethod
    def of(cls, tissue: Tissue) -> PackedTissue:
        """The same tissue, packed."""
        return cls(np.packbits(tissue.mask, axis=1), tissue.lattice)

    def sampled(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """See `Tissue.sampled`."""
        lines, times, columns = _nearest(roi, lattice, self.lattice)
        rows = np.unpackbits(self.bits[lines], axis=1).view(bool)
        return np.repeat(rows[:, columns], times, axis=0)


def _nearest(roi: Roi, lattice: Lattice, mask: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a mask in which the pixels of a rectangle of another lattice lie, how many of its rows in each, and the
    column of each of its columns.
    """
    x_scale, y_scale = lattice.scale_to(mask)
    columns = ((np.arange(roi.x, roi.right) + 0.5) * x_scale).astype(np.int64)
    rows = ((np.arange(roi.y, roi.bottom) + 0.5) * y_scale).astype(np.int64)
    lines, times = np.unique(np.clip(rows, 0, mask.height - 1), return_counts=True)
    return lines, times, np.clip(columns, 0, mask.width - 1)


def find_tissue(slide: Slide, settings: TissueSettings) -> Tissue:
    """The tissue of a slide, from a view at `settings.mpp`. Raises SlideError where the slide cannot be read.

    Stain is told from glass by a threshold (Otsu 1979) held within bounds, so that a slide that is all tissue or has none is
    not split in two. Ink and scanner borders are recognised by colour. Objects of up to `min_area_um2` are dropped, then
    holes of up to `max_hole_um2` filled.
    A large slide's threshold is that of a coarser view, and its view is looked at in bands, to save memory.
    """
    lattice = slide.base.at(Mpp.square(max(settings.mpp, slide.base.mpp.x)))
    levels = _Levels.of(*_glance(slide, lattice.mpp))
    rows, margin = max(_BAND_PIXELS // lattice.width, 1), _margin(lattice.mpp)

    def band(top: int) -> np.ndarray:
        read = Roi(0, top - margin, lattice.width, rows + 2 * margin).intersect(lattice.roi)
        return levels.tissue(slide.read(read, lattice), lattice.mpp)[top - read.y :][:rows]

    count = _bands_at_once(slide, Roi(0, 0, lattice.width, rows + 2 * margin), lattice)
    mask = np.concatenate([found for _, found in ahead(band, range(0, lattice.height, rows), 2 * count, count)])
    pixel_um2 = lattice.mpp.area_um2
    mask = _without_small(mask, True, settings.min_area_um2 / pixel_um2)
    if mask.any():  # else a small slide without tissue would be one hole
        mask = _without_small(mask, False, settings.max_hole_um2 / pixel_um2)
    return Tissue(mask, lattice)


def _bands_at_once(slide: Slide, band: Roi, lattice: Lattice) -> int:
    """How many threads look at bands: one each, but no more than fit into memory, however many processors there are."""
    return min(threads(), max(_MOST_HELD // (slide.pixels_at_once(band, lattice) + _AS_MANY * band.area), 1))


@dataclass(frozen=True)
class _Levels:
    """What tells the tissue of a slide from its glass: the colour of glass, (3,) float, and a threshold on the stain."""

    glass: np.ndarray
    threshold: float

    @classmethod
    def of(cls, view: np.ndarray, mpp: Mpp) -> _Levels:
        """Of a slide that a low-power view, (rows, columns, 3) uint8 RGB, shows."""
        smooth = _smooth(view, mpp)
        light = _glass(smooth)
        candidates = _stain(smooth, light)[~_foreign(view)]
        varied = candidates.size > 0 and np.ptp(candidates) > 0
        threshold = filters.threshold_otsu(candidates) if varied else _FIRMEST
        return cls(light, float(np.clip(threshold, _FAINTEST, _FIRMEST)))

    def tissue(self, view: np.ndarray, mpp: Mpp) -> np.ndarray:
        """Tissue in a view, (rows, columns, 3) uint8 RGB; returns (rows, columns) bool, not yet cleaned by size."""
        mask: np.ndarray = (_stain(_smooth(view, mpp), self.glass) > self.threshold) & ~_foreign(view)
        return mask


def _without_small(mask: np.ndarray, kind: bool, largest: float) -> np.ndarray:
    """A mask, (rows, columns) bool, in which connected pixels of one kind, up to `largest` of them, are of the other.

    By runs it takes half the memory that scikit-image's `remove_small_objects` does, which also takes a quarter of a second
    to import.
    """
    runs = find_runs(mask.view(np.uint8))
    sizes = np.bincount(runs.components, runs.lengths)
    tissue = runs.labels == 1
    small = (tissue == kind) & (sizes[runs.components] <= largest)
    return np.repeat(tissue ^ small, runs.lengths).reshape(mask.shape)


def _margin(mpp: Mpp) -> int:
    """Pixels round a place that decide whether it is tissue: smoothing looks that far, or a speck of ink may reach in."""
    return max(math.ceil(_TRUNCATED * _SMOOTHING_UM / mpp.x), _SPECK + _GROWN) + 1


def _smooth(view: np.ndarray, mpp: Mpp) -> np.ndarray:
    sigma = _SMOOTHING_UM / mpp.x
    planes = (view[..., channel].astype(np.float32) for channel in range(3))
    return np.stack([ndimage.gaussian_filter(plane, sigma, truncate=_TRUNCATED) for plane in planes], axis=-1)


def _stain(view: np.ndarray, light: np.ndarray) -> np.ndarray:
    """How much light a pixel takes away and how unequally over the colours, relative to glass; 0 is glass."""
    high, low = channel_range([np.clip(view[..., channel] / light[channel], 1 / 255, 1) for channel in range(3)])
    stain: np.ndarray = high - low + np.clip(-np.log10(high) - 0.1, 0, None)
    return stain


def _glass(view: np.ndarray) -> np.ndarray:
    """The colour of empty glass in a view: the median of its bright and colourless pixels; white where there are none."""
    high, low = channel_range([view[..., channel] for channel in range(3)])
    bright = view[(low > _GLASS_BRIGHTNESS) & (high - low < _GLASS_TINT)]
    if len(bright) < 0.002 * low.size:
        return np.full(3, 245, np.float32)
    brightest = bright[bright.sum(axis=1) >= np.percentile(bright.sum(axis=1), 75)]
    glass: np.ndarray = np.maximum(np.median(brightest, axis=0), _GLASS_BRIGHTNESS)
    return glass


def _foreign(view: np.ndarray) -> np.ndarray:
    """Pen marks (blue, green, black) and the scanner's border, by colours that stained tissue does not have."""
    red, green, blue = (view[..., channel].astype(np.int16) for channel in range(3))
    high, low = channel_range([red, green, blue])
    black = (high < _BLACK) & (high - low < _BLACK_CHROMA)
    saturated = high - low > _PEN_SATURATION * high
    green_pen = saturated & (green > red * 1.15) & (green > 0.8 * blue)
    blue_pen = saturated & (blue > red * 1.6) & (green > red * 1.02)
    marks = _without_small(black | green_pen | blue_pen, True, _SPECK)
    grown: np.ndarray = ndimage.binary_dilation(marks, iterations=_GROWN)
    return grown


def _glance(slide: Slide, mpp: Mpp) -> tuple[np.ndarray, Mpp]:
    """The view that tells a slide's glass and its threshold, (rows, columns, 3) uint8 RGB, and its scale."""
    seen = slide.base.seen(mpp, _SURVEYED)
    scanned = slide.base.cover(slide.shown, seen).intersect(seen.roi)  # round it is white that is no glass
    return slide.read(scanned, seen), seen.mpp


def light_of(slide: Slide, tissue: Tissue) -> np.ndarray:
    """The colour of empty glass of a slide whose tissue was looked for: (3,) grey levels, 0 to 255."""
    return _glass(_glance(slide, tissue.lattice.mpp)[0])

"""Which part of a slide is tissue, judged from a low-power view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage import filters, morphology, segmentation, transform

from pipeline.config import TissueSettings
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.slide import Slide

_GLASS_BRIGHTNESS = 215  # of 255: glass is not darker than this
_GLASS_TINT = 20  # of 255: glass is not more coloured than this
_FAINTEST, _FIRMEST = 0.035, 0.09  # bounds of the threshold on stain: below is noise, above is surely stained
_BLACK = 70  # of 255: brightest channel of ink and of the scanner's border
_BLACK_CHROMA = 35  # of 255: ink and border are grey; dark nuclei are blue
_PEN_SATURATION = 0.42
_SMOOTHING_UM = 12.0
_LINE = (0, 160, 60)

PICTURE_PIXELS = 2048
"""Longer side of pictures of whole slides."""


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
        """(rows, columns) bool: whether the centre of each pixel of a rectangle of another lattice lies on tissue."""
        x_scale, y_scale = lattice.scale_to(self.lattice)
        columns = ((np.arange(roi.x, roi.right) + 0.5) * x_scale).astype(np.int64)
        rows = ((np.arange(roi.y, roi.bottom) + 0.5) * y_scale).astype(np.int64)
        height, width = self.mask.shape
        lines = self.mask[np.minimum(rows, height - 1)]
        return np.asarray(lines.take(np.minimum(columns, width - 1), axis=1))

    @property
    def area_um2(self) -> float:
        """Area of the tissue in square micrometres."""
        return float(self.mask.sum()) * self.lattice.mpp.area_um2


def find_tissue(slide: Slide, settings: TissueSettings) -> Tissue:
    """The tissue of a slide, from a view at `settings.mpp`. Raises SlideError where the slide cannot be read.

    Stain is told from glass by a threshold (Otsu 1979) held within bounds, so that a slide that is all tissue or has none is
    not split in two. Ink and scanner borders are recognised by colour. Small objects are dropped and small holes filled.
    """
    lattice = slide.base.at(Mpp.square(max(settings.mpp, slide.base.mpp.x)))
    view = slide.read(lattice.roi, lattice)
    mask = tissue_mask(view, lattice.mpp)
    pixel_um2 = lattice.mpp.area_um2
    mask = morphology.remove_small_objects(mask, max_size=int(settings.min_area_um2 / pixel_um2))
    mask = morphology.remove_small_holes(mask, max_size=int(settings.max_hole_um2 / pixel_um2))
    return Tissue(mask, lattice)


def tissue_mask(view: np.ndarray, mpp: Mpp) -> np.ndarray:
    """Tissue in a low-power view, (rows, columns, 3) uint8 RGB; returns (rows, columns) bool, not yet cleaned by size."""
    sigma = _SMOOTHING_UM / mpp.x
    smooth = np.stack([ndimage.gaussian_filter(view[..., c].astype(np.float32), sigma) for c in range(3)], axis=-1)
    foreign = _grown(_ink(view), 2)
    stain = _stain(smooth)
    candidates = stain[~foreign]
    if candidates.size == 0:
        return np.zeros(foreign.shape, bool)
    threshold = filters.threshold_otsu(candidates) if np.ptp(candidates) > 0 else _FIRMEST
    mask: np.ndarray = (stain > np.clip(threshold, _FAINTEST, _FIRMEST)) & ~foreign
    return mask


def _stain(view: np.ndarray) -> np.ndarray:
    """How much light a pixel takes away and how unequally over the colours, relative to glass; 0 is glass."""
    transmission = np.clip(view / glass(view), 1 / 255, 1)
    density = -np.log10(transmission)
    chroma = transmission.max(axis=-1) - transmission.min(axis=-1)
    stain: np.ndarray = chroma + np.clip(density.min(axis=-1) - 0.1, 0, None)
    return stain


def glass(view: np.ndarray) -> np.ndarray:
    """The colour of empty glass in a view: the median of its bright and colourless pixels; white where there are none."""
    pixels = view.reshape(-1, 3)
    bright = pixels[(pixels.min(axis=1) > _GLASS_BRIGHTNESS) & (np.ptp(pixels, axis=1) < _GLASS_TINT)]
    if len(bright) < 0.002 * len(pixels):
        return np.full(3, 245, np.float32)
    brightest = bright[bright.sum(axis=1) >= np.percentile(bright.sum(axis=1), 75)]
    glass: np.ndarray = np.maximum(np.median(brightest, axis=0), _GLASS_BRIGHTNESS)
    return glass


def _ink(view: np.ndarray) -> np.ndarray:
    """Pen marks (blue, green, black) and the scanner's border, by colours that stained tissue does not have."""
    red, green, blue = (view[..., c].astype(np.int16) for c in range(3))
    high, low = view.max(axis=-1).astype(np.int16), view.min(axis=-1).astype(np.int16)
    black = (high < _BLACK) & (high - low < _BLACK_CHROMA)
    saturated = high - low > _PEN_SATURATION * high
    green_pen = saturated & (green > red * 1.15) & (green > 0.8 * blue)
    blue_pen = saturated & (blue > red * 1.6) & (green > red * 1.02)
    marks: np.ndarray = black | green_pen | blue_pen
    specks_gone: np.ndarray = morphology.remove_small_objects(marks, max_size=15)
    return specks_gone


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    grown: np.ndarray = ndimage.binary_dilation(mask, iterations=pixels)
    return grown


def thumbnail(slide: Slide) -> np.ndarray:
    """A slide at a glance: (rows, columns, 3) uint8 RGB, 2048 px on its longer side, or all of a smaller slide."""
    shrink = max(slide.base.width, slide.base.height) / PICTURE_PIXELS
    lattice = slide.base.at(Mpp(slide.base.mpp.x * max(shrink, 1), slide.base.mpp.y * max(shrink, 1)))
    return slide.read(lattice.roi, lattice)


def outlined(slide: Slide, tissue: Tissue) -> np.ndarray:
    """The thumbnail with a line round the tissue and the glass dimmed: (rows, columns, 3) uint8 RGB."""
    picture = thumbnail(slide)
    mask = transform.resize(tissue.mask, picture.shape[:2], order=0)
    line = segmentation.find_boundaries(mask, mode="thick")
    picture = np.where(mask[..., None], picture, picture // 4 * 3 + 32).astype(np.uint8)
    picture[line] = _LINE
    return picture

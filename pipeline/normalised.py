"""Slides as a model with stain normalisation sees them.

A slide's staining is estimated once, from its tissue, and then holds for every pixel. Estimated anew for each tile it would
make a tile's answer depend on where tiles are cut, and tiled would no longer equal whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.grid import Grid
from pipeline.slide import Pixels, Slide
from pipeline.staining import Normalisation, Staining
from pipeline.stains import restained, staining_of
from pipeline.tissue import Tissue, light_of

_MPP = 2.0  # micrometres per pixel of the view: nuclei stand apart from what is around them
_FIELD = 128  # pixels along a side of a field
_FIELDS = 100  # at most, scattered over the tissue: 1.6 Mpx


@dataclass(frozen=True)
class NormalisedSlide:
    """A slide whose stain is made that of a model's reference, pixel by pixel: as tile-invariant as the slide itself."""

    slide: Pixels
    staining: Staining
    normalisation: Normalisation

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        """Pixels as `Slide.read` gives them, normalised; (height, width, 3 n) where n models each have their own way."""
        pixels = self.slide.read(roi, lattice)
        seen = [restained(pixels, self.staining, one) for one in self.normalisation.each]
        return seen[0] if len(seen) == 1 else np.concatenate(seen, axis=-1)


def normalised(slide: Slide, tissue: Tissue, normalisation: Normalisation | None) -> Pixels:
    """A slide as a model sees it that was trained with a normalisation, or with none."""
    if normalisation is None:
        return slide
    return NormalisedSlide(slide, estimate(slide, tissue, normalisation.method), normalisation)


def estimate(slide: Slide, tissue: Tissue, method: str) -> Staining:
    """How a slide is stained, from fields of its tissue at 2 um/px; a coarser scan is taken as it is.

    The same slide and tissue give the same numbers. Raises SlideError where the slide cannot be read.
    """
    lattice = slide.base.at(Mpp.square(max(_MPP, slide.base.mpp.x)))
    cells = (cell.write_roi for cell in Grid(lattice, _FIELD, halo=0, stride=1))
    fields = [roi for roi in cells if tissue.fraction(roi, lattice) > 0]
    chosen = [fields[index] for index in np.random.default_rng(0).permutation(len(fields))[:_FIELDS]]
    pixels = [slide.read(roi, lattice)[tissue.sampled(roi, lattice)] for roi in chosen]
    light = light_of(slide, tissue)
    return staining_of(np.concatenate([np.empty((0, 3), np.uint8), *pixels]), light, method)

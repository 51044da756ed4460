"""What a slide is stained with, told from its tissue, and how slides that are stained differently are made alike.

Both methods know a slide by its light, the grey levels of empty glass, and by some dyes: the optical densities of red, green
and blue where a dye is strong. To normalise is to find how much of each dye a pixel holds, and to draw as much of the
reference's dyes in light of 255: one 3 x 3 matrix on densities, the same for every pixel of the slide. Glass becomes white,
and white stays white.

- `macenko`: haematoxylin and eosin are the extreme directions of the tissue's densities (Macenko et al. 2009, A method for
  normalizing histology slides for quantitative analysis, ISBI: 1107-1110). What neither explains, such as a pigment, is kept
  as it is, as the residual of Ruifrok and Johnston (2001); Macenko drops it.
- `reinhard`: the means of the colours are matched (Reinhard et al. 2001, Color transfer between images, IEEE Comput. Graph.
  Appl. 21: 34-41), but on optical densities and by a factor alone. Their shift, in the space of l, alpha and beta, would
  colour the glass.

The dyes are told here rather than by MONAI's `ExtractHEStains`, against which they are tested, for two reasons: segmenting
imports no MONAI, which would cost every worker seconds and memory; and MONAI 1.6 returns eosin where its reference, and its
documentation, have haematoxylin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.density import density, density_tables, mix
from pipeline.staining import Normalisation, Rgb, Staining

_FAINTEST = 0.15  # density of every colour of a pixel that counts as stained, as Macenko et al. have it
_LEAST_PIXELS = 2000  # stained ones: fewer say too little
_EXTREME = 1  # per cent of pixels at either end that noise may have put there
_STRONG = 99  # percentile of a dye's amount that is taken for strong
_LEAST_ANGLE = 6.0  # degrees between two dyes; closer, there is one dye and noise (seen in stained slides: 13 to 35)
_MOST_NEGATIVE = -0.1  # of a dye's direction: no dye gives light, but noise may seem to
_DIGITS = 6
_BAND_PIXELS = 1 << 16  # mixed at once: what is in between stays in the processor's cache


def restained(image: np.ndarray, found: Staining, wanted: Normalisation) -> np.ndarray:
    """An image (H, W, 3) uint8 RGB of a slide that is stained as `found`, as it would be with the dyes that are `wanted`.

    Each pixel's answer depends on that pixel alone. Where the slide's dyes could not be told, the image is left as it is.
    """
    if not found.dyes:
        return image
    tables = density_tables(np.array(found.light))
    matrix = np.linalg.inv(_basis(found.dyes)) @ _basis(wanted.dyes)
    alike = np.empty_like(image)
    rows = max(_BAND_PIXELS // image.shape[1], 1)
    for top in range(0, image.shape[0], rows):
        band = slice(top, top + rows)
        alike[band] = mix(image[band].transpose(2, 0, 1), tables, matrix).transpose(1, 2, 0)
    return alike


def staining_of(pixels: np.ndarray, light: np.ndarray, method: str) -> Staining:
    """The staining of a slide by pixels of its tissue, (n, 3) uint8 RGB, in `light`, (3,) grey levels of empty glass."""
    found = density(pixels, light)
    stained = found[(found > _FAINTEST).all(axis=1)]
    if len(stained) < _LEAST_PIXELS:
        return Staining(_rgb(light), (), f"only {len(stained)} stained pixels, and {_LEAST_PIXELS} are needed")
    dyes = _METHODS[method](stained)
    problem = _problem(dyes)
    return Staining(_rgb(light), () if problem else tuple(map(_rgb, dyes)), problem)


def reference(stainings: Sequence[Staining], method: str) -> Normalisation | None:
    """The normalisation to the mean of some slides; None where the dyes of none of them could be told."""
    told = [item.dyes for item in stainings if item.dyes]
    return Normalisation(method, tuple(map(_rgb, np.mean(told, axis=0)))) if told else None


def _macenko(stained: np.ndarray) -> np.ndarray:
    """(2, 3): haematoxylin and eosin where they are strong, from the densities (n, 3) of stained pixels."""
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, 1:]
    plane = plane * np.where(stained.mean(axis=0) @ plane < 0, -1, 1)  # else angles may jump from pi to -pi
    across, along = (stained @ plane).T
    angles = np.percentile(np.arctan2(along, across), [_EXTREME, 100 - _EXTREME])
    dyes = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    if dyes[0, 0] * dyes[1, 2] < dyes[1, 0] * dyes[0, 2]:  # haematoxylin takes more red for the blue that it takes
        dyes = dyes[::-1]
    amounts = np.percentile(stained @ np.linalg.pinv(dyes), _STRONG, axis=0)
    return np.asarray(dyes * amounts[:, None])


def _reinhard(stained: np.ndarray) -> np.ndarray:
    """(3, 3): a dye for each colour, as dense as that colour is on average over stained pixels."""
    return np.diag(stained.mean(axis=0))


_METHODS = {"macenko": _macenko, "reinhard": _reinhard}


def _problem(dyes: np.ndarray) -> str:
    """Why these cannot be dyes of which a pixel's colour is mixed, or nothing."""
    directions = dyes / np.linalg.norm(dyes, axis=1, keepdims=True)
    cosines = (directions @ directions.T)[np.triu_indices(len(dyes), 1)]
    angle = float(np.degrees(np.arccos(np.clip(cosines.max(), -1, 1))))
    if not angle >= _LEAST_ANGLE:  # which NaN is not either
        return f"no two dyes: only {angle:.1f} degrees between the colours of the tissue"
    if directions.min() < _MOST_NEGATIVE:
        return f"no dye takes less light than none does: {directions.min():.2f}"
    return ""


def _basis(dyes: Sequence[Rgb]) -> np.ndarray:
    """(3, 3): the dyes, and where there are but two what neither explains: the direction at right angles to both."""
    rows = np.array(dyes)
    if len(rows) == 3:
        return rows
    rest = np.cross(rows[0], rows[1])
    return np.vstack([rows, rest / np.linalg.norm(rest)])


def _rgb(values: np.ndarray) -> Rgb:
    """Red, green and blue, rounded to as many digits as a file keeps."""
    red, green, blue = (round(float(value), _DIGITS) for value in values)
    return red, green, blue

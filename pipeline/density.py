"""Light as optical density, in which dyes add up (Beer and Lambert): takes an image there, mixes its colours, and back.

Logarithm and exponential are tables, so that what is left for each pixel is one 3 x 3 matrix. A pixel's answer depends on
nothing but the pixel, to the bit: an image mixed at once or in pieces gives the same bytes.
"""

from __future__ import annotations

import math

import numpy as np

_STEPS = 2048  # table entries per unit of optical density: an eighth of a grey level at white
_DARKEST = 0.5  # grey level that stands for black, whose density is infinite
_GREY = np.rint(255 * np.exp(-np.arange(math.ceil(math.log(255 / _DARKEST) * _STEPS) + 2) / _STEPS)).astype(np.uint8)


def density(values: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Optical density (natural logarithm) of grey levels, 0 to 255, in `light`, the grey level of none; never below 0."""
    found: np.ndarray = np.maximum(-np.log(np.maximum(values, _DARKEST) / light), 0)
    return found


def density_tables(light: np.ndarray) -> np.ndarray:
    """What `mix` looks up: (3, 256) float32, the density of each grey level of red, green and blue in `light`, (3,)."""
    return (density(np.arange(256), np.reshape(light, (3, 1))) * _STEPS).astype(np.float32)


def mix(planes: np.ndarray, tables: np.ndarray, matrix: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """(3, H, W) uint8 RGB whose densities, as rows, are multiplied by `matrix`, (3, 3), and seen in light of 255.

    `offset` is added to all densities. Without it, what is as bright as the light of `tables` or brighter becomes white.
    """
    start = np.float32(0.5 + offset * _STEPS)
    red, green, blue = (np.take(table, plane) for table, plane in zip(tables, planes, strict=True))
    mixed = np.empty(planes.shape, np.uint8)
    for channel, (of_red, of_green, of_blue) in enumerate(matrix.T.astype(np.float32)):
        steps = of_red * red
        steps += of_green * green
        steps += of_blue * blue
        steps += start
        np.take(_GREY, steps.astype(np.int32), mode="clip", out=mixed[channel])
    return mixed

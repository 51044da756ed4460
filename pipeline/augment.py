"""Random changes of a training patch: one draw moves the image and its mask together.

A patch is read with a margin, turned, bent and cropped, so that no pixel from beyond it ever comes in:

    +---------------+
    |    margin     |      read: (size + 2 * margin) squared
    |   +-------+   |
    |   |  kept |   |      kept: size squared, sampled in one go from its own turned and bent outline
    |   +-------+   |
    +---------------+

All geometry is one coordinate per kept pixel, sampled once (bilinear; nearest for the mask): 3 ms for a patch of 256 pixels
where MONAI's `Rand2DElasticd` takes 25 and its `RandAffined` with flips 13. Nothing here runs on more than one thread, not
even a matrix product: a reader must not take cores from the training step that it feeds. Importing this module does not
import torch, since whoever only names strengths needs none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from pipeline.density import density_tables, mix

# Optical density of red, green and blue for haematoxylin, eosin and DAB: Ruifrok and Johnston (2001), Anal. Quant. Cytol.
# Histol. 23: 291-299, as in skimage.color.rgb_from_hed.
_RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED_FROM_RGB = np.linalg.inv(_RGB_FROM_HED)

_DENSITIES = density_tables(np.full(3, 255.0))

_NODE_SPACING = 32  # pixels between the nodes of an elastic deformation
_OUTSIDE = np.uint8(255)  # white glass in the image, IGNORED in the mask


@dataclass(frozen=True)
class Augmentation:
    """How far a patch may change; 0 is off.

    flips: mirror images and quarter turns, all eight equally likely.
    rotation_degrees: to either side; 45 with `flips`, or 180, makes every direction equally likely.
    scale: factor of size, drawn for each axis, so that shapes are stretched as well.
    elastic_px: shift, along each axis, of nodes 32 pixels apart; up to 15 nothing folds (Choi and Lee, 2000).
    blur_px: standard deviation of a Gaussian.
    stain: factor of haematoxylin, of eosin and of DAB, each drawn for itself (Tellez et al., 2018).
    tint: factor of the optical density of red, of green and of blue, each drawn for itself: other dyes, other cameras.
    brightness: factor of the light.

    Angles, shifts and the blur are drawn evenly up to the value, factors between 1 / (1 + value) and 1 + value, evenly on a
    logarithmic scale. Pixels are those of the model's lattice.
    """

    flips: bool = False
    rotation_degrees: float = 0.0
    scale: float = 0.0
    elastic_px: float = 0.0
    blur_px: float = 0.0
    stain: float = 0.0
    tint: float = 0.0
    brightness: float = 0.0

    @property
    def warps(self) -> bool:
        """Whether pixels have to be interpolated, which mirror images and quarter turns do not need."""
        return self.rotation_degrees != 0 or self.scale != 0 or self.elastic_px != 0

    def margin(self, size: int) -> int:
        """Pixels to read on each side of a patch of `size` pixels, so that no draw needs any beyond them."""
        if not self.warps:
            return 0
        angle = math.radians(min(self.rotation_degrees, 45.0))
        reach = size / 2 * (1 + self.scale) * (math.cos(angle) + math.sin(angle)) + self.elastic_px
        return math.ceil(reach - size / 2) + 1


def augment(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, strengths: Augmentation, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change a patch at random and keep its central `size` x `size` pixels.

    `image` is (H, W, 3) uint8 RGB and `mask` (H, W) uint8, both with `strengths.margin(size)` pixels to spare on each side;
    where they have fewer, white and IGNORED come in. The same state of `rng` gives the same bytes. Returns (size, size, 3)
    and (size, size) uint8. Raises ValueError where the patch is smaller than `size`.
    """
    if min(mask.shape) < size or image.shape != (*mask.shape, 3):
        raise ValueError(f"expected an image and a mask of at least {size} px, found {image.shape} and {mask.shape}")
    draw = _draw(rng, strengths, size)
    planes, labels = image.transpose(2, 0, 1), mask[None]
    if strengths.warps:
        grid = _grid(draw, size, mask.shape)
        planes, labels = _sample(planes, grid, "bilinear"), _sample(labels, grid, "nearest")
    else:
        planes, labels = _centre(planes, size), _centre(labels, size)
    if strengths.stain or strengths.tint or strengths.brightness:
        planes = _restain(planes, draw)
    if strengths.blur_px:
        soft = ndimage.gaussian_filter(planes, (0, draw.blur_px, draw.blur_px), output=np.float32, mode="nearest")
        planes = np.rint(soft).astype(np.uint8)
    turned = np.empty((size, size, 3), np.uint8)
    for channel, plane in enumerate(planes):
        turned[:, :, channel] = _turn(plane, draw)
    return turned, np.ascontiguousarray(_turn(labels[0], draw))


@dataclass(frozen=True)
class _Draw:
    """What chance decided. `matrix` and `nodes` lead from a place in the kept patch to one in the patch read, both from the
    centre; `stains`, `tints` and `light` are factors.
    """

    turns: int
    mirrored: bool
    matrix: np.ndarray
    nodes: np.ndarray
    stains: np.ndarray
    light: float
    blur_px: float
    tints: np.ndarray


def _draw(rng: np.random.Generator, strengths: Augmentation, size: int) -> _Draw:
    """All random numbers, always as many, so that one strength changed leaves the other draws as they were."""
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    angle = math.radians(rng.uniform(-1, 1) * strengths.rotation_degrees)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    factors = (1 + strengths.scale) ** rng.uniform(-1, 1, 2)
    nodes = _spline(size)[0][-1] + 4
    return _Draw(
        turns=turns if strengths.flips else 0,
        mirrored=mirrored and strengths.flips,
        matrix=(rotation * factors).astype(np.float32),
        stains=(1 + strengths.stain) ** rng.uniform(-1, 1, 3),
        light=(1 + strengths.brightness) ** rng.uniform(-1, 1),
        blur_px=strengths.blur_px * rng.uniform(0, 1),
        nodes=(strengths.elastic_px * rng.uniform(-1, 1, (2, nodes, nodes))).astype(np.float32),
        tints=(1 + strengths.tint) ** rng.uniform(-1, 1, 3),
    )


def _turn(plane: np.ndarray, draw: _Draw) -> np.ndarray:
    """Mirror image and quarter turns of a plane: a view."""
    return np.rot90(plane[:, ::-1] if draw.mirrored else plane, draw.turns)


def _centre(planes: np.ndarray, size: int) -> np.ndarray:
    top, left = (planes.shape[1] - size) // 2, (planes.shape[2] - size) // 2
    return planes[:, top : top + size, left : left + size]


def _grid(draw: _Draw, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Where each kept pixel is sampled, as `grid_sample` wants it: (1, size, size, 2) float32 of (x, y), -1 to 1 across."""
    offset = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    grid = np.empty((1, size, size, 2), np.float32)
    for axis, length in enumerate((shape[1], shape[0])):
        along_x, along_y = draw.matrix[axis]
        place = along_x * offset[None, :] + along_y * offset[:, None]
        if draw.nodes.any():
            place += _bend(_bend(draw.nodes[axis], size).T, size).T
        np.multiply(place, np.float32(2 / length), out=grid[0, :, :, axis])
    return grid


@lru_cache(maxsize=8)
def _spline(size: int) -> tuple[np.ndarray, np.ndarray]:
    """First node (size,) and weights (size, 4) of the uniform cubic B-spline at each pixel; the weights sum to 1."""
    place = np.arange(size) / _NODE_SPACING
    first = np.floor(place).astype(np.int64)
    t = (place - first)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first, weights.astype(np.float32)


def _bend(nodes: np.ndarray, size: int) -> np.ndarray:
    """Smooth rows through rows of nodes: (n, columns) to (size, columns) float32."""
    first, weights = _spline(size)
    rows: np.ndarray = weights[:, 0, None] * nodes[first]
    for tap in range(1, 4):
        rows += weights[:, tap, None] * nodes[first + tap]
    return rows


def _sample(planes: np.ndarray, grid: np.ndarray, mode: str) -> np.ndarray:
    """(C, H, W) uint8 at the places of `grid`; sampled as its complement, since grid_sample puts 0 outside."""
    import torch
    from torch.nn import functional

    complement = torch.from_numpy((_OUTSIDE - planes).astype(np.float32))[None]
    sampled = functional.grid_sample(complement, torch.from_numpy(grid), mode, "zeros", align_corners=False)
    pixels: np.ndarray = np.rint(sampled[0].numpy()).astype(np.uint8)
    return _OUTSIDE - pixels


def _restain(planes: np.ndarray, draw: _Draw) -> np.ndarray:
    """(3, H, W) uint8 with the density of each stain, then of each colour, and the light that shines through multiplied.

    Separating, scaling and mixing again is one 3 x 3 matrix on optical densities. White stays white where `light` is 1.
    """
    matrix = _HED_FROM_RGB @ np.diag(draw.stains) @ _RGB_FROM_HED * draw.tints
    return mix(planes, _DENSITIES, matrix, -math.log(draw.light))
